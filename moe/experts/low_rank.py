"""Low-rank adapter (LoRA) of a weight matrix, plain or stacked over experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...dispatch.reorder import wide
from .four_bit import FourBitMatrix, Matrix
from .sharded import held_slice, local, seeded


class LowRank(nn.Module):
    """LoRA adapter of a frozen matrix W: x W becomes x W + scale (x A) B^T.

    `a` [in, r] starts uniform within 1 / sqrt(in), and `b` [out, r] starts at zero. If W is stacked over experts, both
    are stacked as well, and they are DTensors where W is one. Expert e has the same initial values at every world size.

    Args:
        matrix: W, [in, out] or [E, in, out]; the second may be in 4 bits.
        transposed: whether W is stored as [out, in].
        rank: rank r of the adapter.
        scale: factor of the low-rank product.
        seed, name: seed of the initial values of `a`, and a name that makes them differ between matrices. Both must be
            the same on all ranks.

    Attributes:
        active: whether the product is computed; False while it is switched off, or another adapter is in use.
        merged: whether W contains the product, so that it is not computed separately.

    References:
        LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3.
    """

    def __init__(self, matrix: Matrix, transposed: bool, rank: int, scale: float, seed: int, name: str) -> None:
        super().__init__()
        self.transposed, self.scale, self.seed, self.name = transposed, scale, seed, name
        self.active, self.merged = True, False
        fan_in, fan_out = matrix.shape[-2:] if not transposed else matrix.shape[:-3:-1]
        self.a, self.b = (nn.Parameter(_like(matrix, shape)) for shape in ((fan_in, rank), (fan_out, rank)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, order: Sequence[int] | None = None) -> None:
        """Initialise `a`, set `b` to zero, and forget a merge.

        Args:
            order: expert in each slot, as `Experts.order`; None, the default, is the order of their ids.
        """
        if self.a.is_meta:
            return
        self.merged = False
        local(self.b).zero_()
        held, bound = held_slice(self.a), 1 / math.sqrt(self.a.shape[-2])
        first, stacked = (held[0].start, local(self.a)) if self.a.ndim == 3 else (0, local(self.a).unsqueeze(0))
        for place, a in enumerate(stacked):
            drawn = torch.empty(self.a.shape[-2:], device="cpu", dtype=torch.float32)
            expert = first + place if order is None else order[first + place]
            drawn.uniform_(-bound, bound, generator=seeded(self.seed, f"{expert}/low rank/{self.name}"))
            a.copy_(drawn[held[-2:]])

    def beside(self, y: Tensor, x: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Add the adapter's output to y = x W. `product` multiplies rows by a matrix (plain or grouped)."""
        if self.merged or not self.active:
            return y
        return y + product(product(x, local(self.a)) * self.scale, local(self.b).mT)

    @torch.no_grad()
    def merge(self, matrix: Tensor, sign: int) -> None:
        """Add the low-rank product to `matrix`, or subtract it if `sign` is -1. Each expert is rounded once."""
        each = (local(t) if t.ndim == 3 else local(t).unsqueeze(0) for t in (matrix, self.a, self.b))
        for w, a, b in zip(*each, strict=True):
            change = wide(a) @ wide(b).T * (sign * self.scale)
            w.copy_(wide(w) + (change.T if self.transposed else change))
        self.merged = sign > 0

    def extra_repr(self) -> str:
        """Text that ``print(model)`` shows."""
        return f"rank={self.b.shape[-1]}, scale={self.scale}{', merged' if self.merged else ''}"


def _like(matrix: Matrix, shape: tuple[int, int]) -> Tensor:
    """Empty tensor of `shape` for each matrix of a stack, with the same placement, in float32 or float64 to train."""
    if isinstance(matrix, FourBitMatrix):
        where, stack = matrix.absmax, local(matrix.absmax).shape[:1]
    else:
        where, stack = matrix, local(matrix).shape[:-2]
    dtype = torch.promote_types(where.dtype, torch.float32)
    empty = local(where).new_empty(*stack, *shape, dtype=dtype)
    if isinstance(where, DTensor):
        return DTensor.from_local(empty, where.device_mesh, where.placements, run_check=False)
    return empty
