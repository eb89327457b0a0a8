"""Models built from the layer. Start at `gpt.py`."""

from .boundary import Boundary
from .gpt import GPT, GPTConfig
from .pipeline import Pipeline
from .recompute import recompute
from .stages import Stages

__all__ = ["GPT", "Boundary", "GPTConfig", "Pipeline", "Stages", "recompute"]
