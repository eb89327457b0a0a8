"""Expert networks: E of one shape, their tensors stacked. Start at `feed_forward.py`."""

from .base import Experts
from .feed_forward import FeedForwardExperts

__all__ = ["Experts", "FeedForwardExperts"]
