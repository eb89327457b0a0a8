"""Models built from the layer. Start at `gpt.py`."""

from .gpt import GPT, GPTConfig
from .loss import next_token_loss
from .recompute import recompute
from .tensor_parallel import tensor_parallel

__all__ = ["GPT", "GPTConfig", "next_token_loss", "recompute", "tensor_parallel"]
