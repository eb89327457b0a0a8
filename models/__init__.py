"""Models built from the layer. Start at `gpt.py`; on many ranks, at `parallel.py`."""

from .boundary import Boundary
from .data_parallel import data_parallel
from .gpt import GPT, GPTConfig
from .loss import next_token_loss
from .parallel import ParallelModel, parallel_model
from .pipeline import Pipeline
from .recompute import recompute
from .stages import Stages
from .tensor_parallel import tensor_parallel

__all__ = [
    "GPT",
    "Boundary",
    "GPTConfig",
    "ParallelModel",
    "Pipeline",
    "Stages",
    "data_parallel",
    "next_token_loss",
    "parallel_model",
    "recompute",
    "tensor_parallel",
]
