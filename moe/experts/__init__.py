"""Expert networks: E networks of one shape, with stacked parameters. Start at `feed_forward.py`."""

from .base import Experts
from .feed_forward import FeedForwardExperts

__all__ = ["Experts", "FeedForwardExperts"]
