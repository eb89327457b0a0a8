"""What travels between the stages of a pipeline, where several ranks of tensor parallelism hold each stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Boundary:
    """Each of the t ranks of a stage sends 1/t of the hidden states to its peer in the next stage.

    The links between stages are the slow ones. Where hidden states lie split over the sequence, a rank sends what it
    has; where all t ranks have the same, it sends its columns, and those that arrive are gathered over the fast
    links inside the stage (Megatron-LM's scatter/gather, arXiv:2104.04473, section 4.1). Gradients go back alike.

    Attributes:
        dim: model width D.
        group: the ranks that split the layers of a stage (tensor parallelism); None is this rank alone.
        sequence_parallel: between blocks each of them has its part of every sequence [B, S / t, D], not all of it.
    """

    dim: int
    group: ProcessGroup | None = None
    sequence_parallel: bool = True

    def shape(self, batch: int, length: int) -> tuple[int, int, int]:
        """Shape of what a rank sends for `batch` sequences of `length` tokens."""
        size = 1 if self.group is None else dist.get_world_size(self.group)
        split = length if self.sequence_parallel else self.dim
        if split % size:
            what = "sequences of {} tokens do" if self.sequence_parallel else "a width of {} does"
            raise ValueError(f"{what.format(split)} not split over tp={size} ranks; use a multiple of {size}")
        if self.sequence_parallel:
            return batch, length // size, self.dim
        return batch, length, self.dim // size

    def leave(self, x: Tensor) -> Tensor:
        """Hidden states of a stage -> what this rank sends, contiguous."""
        return cast(Tensor, _Columns.apply(x, self.group, False)) if self._whole() else x.contiguous()

    def arrive(self, x: Tensor) -> Tensor:
        """What this rank received -> hidden states of the stage."""
        return cast(Tensor, _Columns.apply(x, self.group, True)) if self._whole() else x

    def _whole(self) -> bool:
        return self.group is not None and not self.sequence_parallel and dist.get_world_size(self.group) > 1


class _Columns(torch.autograd.Function):
    """x [..., D], the same on all ranks, to this rank's columns [..., D / t]; `gathered`, the other way round.

    Each is the other's backward: gradients of what all ranks have alike are alike, too.
    """

    @staticmethod
    def forward(ctx, x, group, gathered):
        ctx.back = group, not gathered
        return _gathered(x, group) if gathered else _own(x, group)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Columns.apply(grad, *ctx.back), None, None


def _own(x: Tensor, group: ProcessGroup) -> Tensor:
    return x.chunk(dist.get_world_size(group), dim=-1)[dist.get_rank(group)].contiguous()


def _gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
