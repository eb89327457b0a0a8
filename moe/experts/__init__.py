"""Expert networks: E of one shape, their tensors stacked. Start at `base.py`, then `grouped_mm.py`."""

from .base import Experts, FeedForwardExperts

__all__ = ["Experts", "FeedForwardExperts"]
