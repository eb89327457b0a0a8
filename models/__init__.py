"""Models built from the layer. Start at `gpt.py`; on many ranks, at `parallel.py`."""

from .data_parallel import data_parallel
from .gpt import GPT, GPTConfig
from .loss import next_token_loss
from .parallel import ParallelModel, parallel_model
from .recompute import recompute
from .tensor_parallel import tensor_parallel

__all__ = [
    "GPT",
    "GPTConfig",
    "ParallelModel",
    "data_parallel",
    "next_token_loss",
    "parallel_model",
    "recompute",
    "tensor_parallel",
]
