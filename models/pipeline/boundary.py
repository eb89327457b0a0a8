"""Hidden states between pipeline stages, where tensor parallelism spreads each stage over several ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Boundary:
    """Sends hidden states between stages: each of a stage's t tensor-parallel ranks sends 1/t of them to its peer.

    Links between stages are slow, links inside a stage fast. With sequence parallelism a rank sends the part that it
    has. Without it all t ranks have the same hidden states: each sends its columns, and the receivers gather them.
    Gradients return the same way.

    Args:
        dim: model width D.
        group: group of the t tensor-parallel ranks of a stage. None, the default, is this rank alone.
        sequence_parallel: whether each rank has its part of every sequence, [B, S / t, D], between blocks; True by
            default.
        parts: number of ranks along "cp", each with its own part of every sequence; 1 by default.

    References:
        Megatron-LM's scatter/gather, arXiv:2104.04473, section 4.1.

    >>> Boundary(dim=64).shape(batch=2, length=16)
    (2, 16, 64)
    """

    dim: int
    group: ProcessGroup | None = None
    sequence_parallel: bool = True
    parts: int = 1

    def shape(self, batch: int, length: int) -> tuple[int, int, int]:
        """Shape of the tensor that a rank sends for `batch` sequences of `length` tokens, before any split.

        Raises:
            ValueError: a length, or a width D, that does not split over the ranks.
        """
        size = 1 if self.group is None else dist.get_world_size(self.group)
        if length % self.parts:
            raise ValueError(
                f"sequences of {length} tokens do not split over cp={self.parts} ranks; use a multiple of {self.parts}"
            )
        length //= self.parts
        split = length if self.sequence_parallel else self.dim
        if split % size:
            what = "sequences of {} tokens do" if self.sequence_parallel else "a width of {} does"
            raise ValueError(f"{what.format(split)} not split over tp={size} ranks; use a multiple of {size}")
        if self.sequence_parallel:
            return batch, length // size, self.dim
        return batch, length, self.dim // size

    def leave(self, x: Tensor) -> Tensor:
        """Hidden states at the end of a stage -> the contiguous tensor that this rank sends."""
        return cast(Tensor, _Columns.apply(x, self.group, False)) if self._whole() else x.contiguous()

    def arrive(self, x: Tensor) -> Tensor:
        """Tensor that this rank received -> hidden states at the start of its stage."""
        return cast(Tensor, _Columns.apply(x, self.group, True)) if self._whole() else x

    def _whole(self) -> bool:
        return self.group is not None and not self.sequence_parallel and dist.get_world_size(self.group) > 1


class _Columns(torch.autograd.Function):
    """Take this rank's columns [..., D / t] of x [..., D], or with `gathered` all-gather them.

    Each is the other's backward, without a sum: x is equal on all ranks, and so is its gradient.
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
