"""Checks of a pipeline's sizes, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .partition import Stages


def check_batch(tokens: Tensor, micro_batches: int) -> None:
    """Raise a ValueError if a batch [B, S] is empty, or does not split into equal micro-batches."""
    if len(tokens) % micro_batches or not len(tokens):
        raise ValueError(
            f"a batch of {len(tokens)} sequences does not split into {micro_batches} micro-batches; use a multiple of "
            f"{micro_batches}"
        )


def check_rows(inputs: Sequence[Tensor], rows: int) -> None:
    """Raise a ValueError if inputs of a model have other numbers of sequences than the targets."""
    if others := {len(x) for x in inputs} - {rows}:
        raise ValueError(f"inputs and targets must be of as many sequences; got {others.pop()} and {rows}")


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
