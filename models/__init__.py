"""Transformers with MoE layers, and what trains them on many ranks: GPT, BERT, T5, Swin, parallelism, checkpoints.

Read `gpt.py` first. `blocks.py` has the blocks that it shares with `bert.py` and `t5.py`. `swin.py` is for
images. For many ranks, start at `parallel_model.py`.
"""

from .bert import BERT, BERTConfig
from .context_parallel import SequenceSplit, context_parallel
from .data_parallel import data_parallel
from .distillation import distillation_loss, inherit
from .ema import EMA
from .generation import generate
from .gpt import GPT, GPTConfig
from .loss import next_token_loss
from .muon import Muon, muon_groups
from .objectives import OBJECTIVES, Objective, corrupt_spans, mask_tokens
from .parallel_model import ParallelModel, parallel_model
from .pipeline.boundary import Boundary
from .pipeline.engine import Pipeline
from .pipeline.partition import Stages
from .recompute import recompute
from .swin import Swin, SwinConfig
from .t5 import T5, T5Config
from .tensor_parallel import tensor_parallel

__all__ = [
    "BERT",
    "EMA",
    "GPT",
    "OBJECTIVES",
    "T5",
    "BERTConfig",
    "Boundary",
    "GPTConfig",
    "Muon",
    "Objective",
    "ParallelModel",
    "Pipeline",
    "SequenceSplit",
    "Stages",
    "Swin",
    "SwinConfig",
    "T5Config",
    "context_parallel",
    "corrupt_spans",
    "data_parallel",
    "distillation_loss",
    "generate",
    "inherit",
    "mask_tokens",
    "muon_groups",
    "next_token_loss",
    "parallel_model",
    "recompute",
    "tensor_parallel",
]
