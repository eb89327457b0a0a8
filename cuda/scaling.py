"""Operands in float8 (e4m3) with a scale for each row, or for each column of an expert's matrix, made by Triton.

Import this module where it is used, as `grouped.py`. `moe/experts/float8.py` makes the same numbers, to the bit.
"""

# A Triton kernel is an object, not the function that pyright sees.
# pyright: reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv

from .scaled import Scaled
from .scaling_kernels import columns_kernel, rows_kernel

FLOAT8 = torch.float8_e4m3fn
_WARPS = {number: {"num_warps": number} for number in (4, 8)}  # an option of Triton's, not an argument


def rows(*each: Tensor, ends: Tensor | None = None) -> list[Scaled]:
    """One or two tensors [R, K] of like rows, with one scale [R] for both. Rows past ends[-1] stay undefined."""
    a, b = each if len(each) == 2 else (each[0], None)
    R, K = a.shape
    to_a, scale = torch.empty_like(a, dtype=FLOAT8), a.new_empty(R, dtype=torch.float32)
    to_b = None if b is None else torch.empty_like(b, dtype=FLOAT8)
    if R:
        BM, BK = (16, 16) if a.device.type == "cpu" else (4, 512)
        L = 0 if ends is None else len(ends)
        rows_kernel[(cdiv(R, BM),)](a, b, ends, to_a, to_b, scale, R, L=L, K=K, BM=BM, BK=BK, **_WARPS[4])
    return [Scaled(t, scale, a.dtype) for t in (to_a, to_b) if t is not None]


def columns(matrix: Tensor) -> Scaled:
    """Matrices [L, K, N] by columns: values [L, N, K], scale [L, N]."""
    L, K, N = matrix.shape
    values, scale = matrix.new_empty(L, N, K, dtype=FLOAT8), matrix.new_empty(L, N, dtype=torch.float32)
    BK, BN = (16, 16) if matrix.device.type == "cpu" else (128, 64)
    columns_kernel[(cdiv(N, BN), L)](matrix, values, scale, K=K, N=N, BK=BK, BN=BN, **_WARPS[8])
    return Scaled(values, scale, matrix.dtype)


def matrix_rows(*matrices: Tensor) -> list[Scaled]:
    """One or two stacks of matrices [L, N, K] by rows: values [L, N, K], one scale [L, N] for both."""
    found, shape = rows(*(t.view(-1, t.shape[2]) for t in matrices)), matrices[0].shape
    return [Scaled(each.values.view(shape), each.scale.view(shape[:2]), each.dtype) for each in found]
