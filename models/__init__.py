"""Models built from the layer. Start at `gpt.py`."""

from .boundary import Boundary
from .gpt import GPT, GPTConfig
from .loss import next_token_loss
from .pipeline import Pipeline
from .recompute import recompute
from .stages import Stages
from .tensor_parallel import tensor_parallel

__all__ = [
    "GPT",
    "Boundary",
    "GPTConfig",
    "Pipeline",
    "Stages",
    "next_token_loss",
    "recompute",
    "tensor_parallel",
]
