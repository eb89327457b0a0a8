"""Compression of rows to bfloat16 or float8 while they are sent."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Wire: TypeAlias = Literal["bf16", "fp8"]
WIRES = ("bf16", "fp8")

_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
_SMALLEST = torch.finfo(torch.float32).tiny


def pack(rows: Tensor, wire: Wire) -> Tensor:
    """Compress rows [R, D] to bfloat16 [R, D], or for "fp8" to uint8 [R, D + 4].

    "fp8" is e4m3 with one float32 scale for each row, in its last four bytes. The scale is the row's largest finite
    magnitude / 448. The type is uint8 because gloo sends no float8 (torch 2.13). The error of a value is at most the
    larger of 2^-4 of the value and 2^-10 of the scale. NaN and infinities become NaN, because e4m3 has no infinity.
    They do not affect the rest of their row.

    "bf16" has an error of at most 2^-8 of a value, and keeps infinities. float16 values beyond 65280 come back as
    infinity.

    Args:
        rows: [R, D], floating.
        wire: the format, ``"bf16"`` or ``"fp8"``.

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
    scale = (largest / _LARGEST).clamp(min=_SMALLEST)  # never 0, even for zeros and tiny numbers
    small = torch.where(finite, rows / scale, torch.nan).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return torch.cat([small.view(torch.uint8), scale.view(torch.uint8)], 1)


def unpack(packed: Tensor, wire: Wire, dtype: torch.dtype) -> Tensor:
    """Rows [R, D] of `dtype` from the output of `pack`."""
    if wire == "bf16":
        return packed.to(dtype)
    scale = packed[:, -4:].clone(memory_format=torch.contiguous_format)  # the four bytes are not aligned in the row
    small, scale = packed[:, :-4].view(torch.float8_e4m3fn), scale.view(torch.float32)
    return (small.float() * scale).to(dtype)


def row_bytes(dim: int, number: int, wire: Wire | None) -> int:
    """Bytes that are sent for a row, averaged over forward and backward.

    Args:
        dim: width D of the row.
        number: bytes of each number in the dtype of the rows.
        wire: the format; None sends rows as they are.

    >>> row_bytes(1024, 4, None), row_bytes(1024, 4, "bf16"), row_bytes(1024, 4, "fp8")
    (4096, 2048, 1538)
    """
    if wire is None:
        return dim * number
    return 2 * dim if wire == "bf16" else (dim + 4 + 2 * dim) // 2
