"""Rows in fewer bytes while they travel."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Wire: TypeAlias = Literal["bf16", "fp8"]
WIRES = ("bf16", "fp8")

_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
_SMALLEST = torch.finfo(torch.float32).tiny


def pack(rows: Tensor, wire: Wire) -> Tensor:
    """What is sent in place of rows [R, D]: bfloat16 [R, D], or for "fp8" uint8 [R, D + 4].

    "fp8" is e4m3 with one float32 scale for each row, its largest finite magnitude / 448, in the last
    four bytes; as bytes, because gloo sends no float8 (torch 2.13). A value is off by at most the larger of
    2^-4 of itself and 2^-10 of the scale. e4m3 has no infinity: infinities become NaN, as NaN
    does, and leave the rest of their row as it is. "bf16" keeps infinities and is off by 2^-8 of a value;
    float16 beyond 65280 comes back as infinity.

    >>> rows = torch.tensor([[1.0, -3.5], [0.0, 0.0]])
    >>> unpack(pack(rows, "fp8"), "fp8", torch.float32).tolist()
    [[1.0, -3.5], [0.0, 0.0]]
    """
    if wire == "bf16":
        return rows.to(torch.bfloat16)
    rows = rows.float()
    finite = rows.isfinite()
    magnitude = torch.where(finite, rows.abs(), 0)
    largest = magnitude.amax(1, keepdim=True) if rows.shape[1] else magnitude.new_zeros(len(rows), 1)
    scale = (largest / _LARGEST).clamp(min=_SMALLEST)  # not 0: of rows of zeros, and of values float32 cannot divide
    small = torch.where(finite, rows / scale, torch.nan).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return torch.cat([small.view(torch.uint8), scale.view(torch.uint8)], 1)


def unpack(packed: Tensor, wire: Wire, dtype: torch.dtype) -> Tensor:
    """Rows [R, D] again, from what `pack` made of them."""
    if wire == "bf16":
        return packed.to(dtype)
    scale = packed[:, -4:].clone(memory_format=torch.contiguous_format)  # its four bytes are not aligned in there
    small, scale = packed[:, :-4].view(torch.float8_e4m3fn), scale.view(torch.float32)
    return (small.float() * scale).to(dtype)


def row_bytes(dim: int, number: int, wire: Wire | None) -> int:
    """Bytes of a row of `dim` numbers of `number` bytes on its way, mean of forward and backward.

    >>> row_bytes(1024, 4, None), row_bytes(1024, 4, "bf16"), row_bytes(1024, 4, "fp8")
    (4096, 2048, 1538)
    """
    if wire is None:
        return dim * number
    return 2 * dim if wire == "bf16" else (dim + 4 + 2 * dim) // 2
