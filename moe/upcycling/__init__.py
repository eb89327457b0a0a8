"""Upcycling: dense feed-forward blocks become MoE layers that compute the same at first. Start at `upcycle.py`."""

from .upcycle import upcycle

__all__ = ["upcycle"]
