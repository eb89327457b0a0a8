"""Frozen matrices of the experts in 4 bits (NF4), and their grouped product. Needs bitsandbytes (`turnout[qlora]`)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...dispatch.torch_internals import transformed
from .grouped_mm import Product, computed, fits_torch, mm, one_by_one
from .sharded import local

BLOCK = 64  # numbers that share one absolute maximum
_GROUP = 1 << 25  # numbers that are dequantised at a time, or one expert's: 64 MiB in bfloat16


class FourBitMatrix(nn.Module):
    """A stack of frozen matrices [E, rows, columns] in NF4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

    Each block of 64 numbers is divided by its largest absolute value, and each quotient is rounded to one of 16 levels,
    which a normal distribution fills evenly. That takes 4.5 bits a number. The layout in memory is bitsandbytes'.

    Args:
        matrix: floating, [E, rows, columns], or a DTensor of that shape that is split on axis 0 alone.

    Attributes:
        packed: uint8 [E, rows * columns / 2], two numbers in a byte.
        absmax: int32 [E, rows * columns / 64]: the bits of float32, so that ``model.to(dtype)`` leaves them alone.
        shape: of the whole stack, (E, rows, columns).
        dtype: of the matrix that it was made of.

    Raises:
        ValueError: a matrix is no whole number of blocks.
        ImportError: bitsandbytes is not installed.
    """

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.shape, self.dtype = matrix.shape, matrix.dtype
        if math.prod(matrix.shape[1:]) % BLOCK:
            raise ValueError(f"a matrix {tuple(matrix.shape[1:])} is no whole number of blocks of {BLOCK} numbers")
        every = [_quantized(expert) for expert in local(matrix.detach())]  # one at a time: little is needed beside it
        packed, absmax = (torch.stack(parts) for parts in zip(*every, strict=True))
        self.packed = nn.Parameter(_placed(packed, matrix), requires_grad=False)
        self.absmax = nn.Parameter(_placed(absmax.view(torch.int32), matrix), requires_grad=False)

    @property
    def held(self) -> FourBit:
        """What lies on this rank."""
        return FourBit(local(self.packed), local(self.absmax), (self.shape[1], self.shape[2]))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """All that lies here, [L, rows, columns]; a DTensor where `packed` is one."""
        return _placed(self.held.dense(0, len(self.held), dtype), self.packed)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{tuple(self.shape)}, nf4"


Matrix = Tensor | FourBitMatrix


@dataclass(frozen=True)
class FourBit:
    """The part of a `FourBitMatrix` that lies on this rank, to be multiplied by: [L, in, out].

    Attributes:
        packed, absmax: its plain tensors.
        size: (rows, columns) of one matrix as it is stored.
        transposed: it is multiplied by as [columns, rows].
    """

    packed: Tensor
    absmax: Tensor
    size: tuple[int, int]
    transposed: bool = False

    @property
    def mT(self) -> FourBit:
        """The same, each matrix transposed."""
        return replace(self, transposed=not self.transposed)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, in, out)."""
        rows, columns = self.size
        return (len(self), columns, rows) if self.transposed else (len(self), rows, columns)

    def __len__(self) -> int:
        return len(self.packed)

    def dense(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Matrices first to last - 1, dequantised, [last - first, in, out]."""
        _bitsandbytes()
        packed, absmax = self.packed[first:last].flatten(), self.absmax[first:last].flatten().view(torch.float32)
        wide = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32  # what its kernels return
        # A row is one block: where rows of another length end inside a block, its kernel for CPUs is wrong (0.50.2).
        blocks = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, BLOCK, "nf4", [len(absmax), BLOCK], wide)
        matrices = blocks.view(last - first, *self.size).to(dtype)
        return matrices.mT if self.transposed else matrices

    def product(self) -> Product:
        """What computes `grouped_mm` by such matrices."""
        return _dequantized_at_once if transformed() else _grouped


def _grouped(rows: Tensor, weight: FourBit, ends: Tensor) -> Tensor:
    return _grouped_mm_nf4(rows, weight.packed, weight.absmax, ends, list(weight.size), weight.transposed)


def _dequantized_at_once(rows: Tensor, weight: FourBit, ends: Tensor) -> Tensor:
    return one_by_one(rows, weight.dense(0, len(weight), rows.dtype), ends)


@torch.library.custom_op("turnout::grouped_mm_nf4", mutates_args=())
def _grouped_mm_nf4(
    rows: Tensor, packed: Tensor, absmax: Tensor, ends: Tensor, size: list[int], transposed: bool
) -> Tensor:
    """A few experts are dequantised and used, then the next; only those that have rows. The host reads ends."""
    weight, stops = FourBit(packed, absmax, (size[0], size[1]), transposed), [0, *ends.tolist()]
    y = rows.new_empty(len(rows), weight.shape[2])
    for first, last in _runs(stops, max(1, _GROUP // math.prod(size))):
        few, span = weight.dense(first, last, computed(rows)), slice(stops[first], stops[last])
        if rows.is_cuda and fits_torch(rows, few):
            y[span] = F.grouped_mm(rows[span], few, offs=ends[first:last] - stops[first])
        else:
            for e, matrix in enumerate(few, first):
                mm(rows[stops[e] : stops[e + 1]], matrix, out=y[stops[e] : stops[e + 1]])
    return y


def _runs(stops: list[int], most: int) -> Iterator[tuple[int, int]]:
    """First expert, and the one after the last, of runs of up to `most` experts that all have rows.

    >>> list(_runs([0, 2, 3, 3, 5, 6, 9], most=2))
    [(0, 2), (3, 5), (5, 6)]
    """
    first = 0
    for e, (start, stop) in enumerate(pairwise(stops)):
        empty = start == stop
        if first < e and (empty or e - first == most):
            yield first, e
            first = e
        first += empty
    if first < len(stops) - 1:
        yield first, len(stops) - 1


@_grouped_mm_nf4.register_fake
def _(rows: Tensor, packed: Tensor, absmax: Tensor, ends: Tensor, size: list[int], transposed: bool) -> Tensor:
    return rows.new_empty(rows.shape[0], size[0] if transposed else size[1])


def _save_inputs(ctx, inputs, output) -> None:
    _, packed, absmax, ends, ctx.size, ctx.transposed = inputs
    ctx.save_for_backward(packed, absmax, ends)


def _backward(ctx, grad: Tensor):
    to_rows = _grouped_mm_nf4(grad.contiguous(), *ctx.saved_tensors, ctx.size, not ctx.transposed)
    return to_rows, None, None, None, None, None


_grouped_mm_nf4.register_autograd(_backward, setup_context=_save_inputs)


def _quantized(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """One expert's [rows, columns] -> bytes [rows * columns / 2] and float32 [rows * columns / 64]."""
    _bitsandbytes()
    narrow = matrix.dtype in (torch.bfloat16, torch.float16)
    matrix = (matrix if narrow else matrix.float()).contiguous()
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit(matrix, BLOCK, "nf4", torch.uint8)
    return packed.flatten(), absmax


def _placed(stack: Tensor, like: Tensor) -> Tensor:
    """A stack of what this rank holds, spread as another one."""
    if isinstance(like, DTensor):
        return DTensor.from_local(stack, like.device_mesh, like.placements, run_check=False)
    return stack


def _bitsandbytes() -> None:
    """Let it register its operators."""
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ImportError('experts in 4 bits need bitsandbytes: pip install "turnout[qlora]"') from error
