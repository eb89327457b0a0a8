"""Kernels of the experts, measured on the GPU at hand. Start at `tuning.py`."""

from .results import Tuned, Tuning
from .tuning import autotune

__all__ = ["Tuned", "Tuning", "autotune"]
