"""Dense feed-forward blocks turned into mixtures of experts that compute the same function. Start at `upcycle.py`."""

from .upcycle import upcycle

__all__ = ["upcycle"]
