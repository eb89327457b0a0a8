"""Checks of a pipeline's sizes, before anything runs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from .partition import Stages


def check_sizes(stages: Stages, group: ProcessGroup, micro_batches: int) -> None:
    """Raise a ValueError if schedule, ranks and micro-batches do not go together."""
    if stages.schedule in ("interleaved_zb", "zbv") and torch.__version__ < "2.13":
        raise ValueError(
            f"schedule {stages.schedule!r} needs torch 2.13: in torch {torch.__version__} a backward in two halves "
            "fails at custom autograd functions, which experts use; use interleaved1f1b, or update torch"
        )
    ranks = dist.get_world_size(group)
    if stages.ranks != ranks:
        raise ValueError(
            f"the model was cut for {stages.ranks} ranks, but the group has {ranks}; use Stages.of(..., ranks={ranks})"
        )
    if micro_batches < 1:
        raise ValueError(f"micro_batches must be positive; got {micro_batches}")
    if stages.schedule == "gpipe":
        return
    if micro_batches < ranks:
        raise ValueError(
            f"{stages.schedule} needs at least as many micro-batches as ranks, {ranks}; got {micro_batches}; use "
            "more of them, or use gpipe"
        )
    rounds = micro_batches // ranks
    if stages.schedule.startswith("interleaved") and micro_batches % rounds:
        raise ValueError(
            f"{stages.schedule} runs {micro_batches} micro-batches on {ranks} ranks in {rounds} rounds, which must "
            f"have equal sizes; use a multiple of {ranks}"
        )
