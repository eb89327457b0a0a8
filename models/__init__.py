"""Models built from the layer. Start at `gpt.py`."""

from .gpt import GPT, GPTConfig
from .recompute import recompute

__all__ = ["GPT", "GPTConfig", "recompute"]
