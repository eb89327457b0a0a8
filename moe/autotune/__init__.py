"""Autotuning of the experts' kernels on the GPU at hand. Start at `tuning.py`."""

from .results import Tuned, Tuning
from .tuning import autotune

__all__ = ["Tuned", "Tuning", "autotune"]
