"""Models built from the layer. Start at `gpt.py`."""

from .gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
