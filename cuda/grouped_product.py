# type: ignore (the language of Triton, which looks like Python)
"""Building blocks of the grouped GEMM kernels: the tile of a program, loads of its operands, and the sum of products.

An operand is a pointer or a tensor descriptor, and the kernel tells them apart by type at compile time. The copy engine
of sm_90 and later (TMA) reads a descriptor. It needs no addresses and no masks, and fills with zeros outside. Rows that
are contiguous in memory have a descriptor in the form of `ragged_tma`, so the engine also knows where an expert's rows
end. Gathered rows have pointers.
"""

# ruff: noqa: RET505 (Triton leaves a branch out by its constant condition, but does not know that a return ends it)

from __future__ import annotations

import triton
import triton.language as tl
from triton.tools.ragged_tma import load_ragged

TOGETHER = tl.constexpr(8)  # row tiles that share the columns of a weight while they are in the L2 cache


@triton.jit
def place(num_m, num_n):
    """Row and column of this program's tile."""
    program = tl.program_id(0)
    first = program // (TOGETHER * num_n) * TOGETHER
    height = tl.minimum(num_m - first, TOGETHER)
    program %= TOGETHER * num_n
    return first + program % height, program // height


@triton.jit
def within(index, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """index < SIZE, which is a constant if blocks divide the size."""
    if SIZE % BLOCK == 0:
        return tl.full(index.shape, 1, tl.int1)
    else:
        return index < SIZE


@triton.jit
def span(ends, expert):
    """First row of an expert, and the end of its rows."""
    start = 0
    if expert > 0:
        start = tl.load(ends + expert - 1)
    return start, tl.load(ends + expert)


@triton.jit
def source(row, end, token):
    """Source row of each row of a tile, int64; -1 = none."""
    if token is None:
        return tl.where(row < end, row, -1).to(tl.int64)
    else:
        return tl.load(token + row, mask=row < end, other=-1)


@triton.jit
def rows(a, found, first, end, start, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Rows of a tile, [BM, BK], with columns from `start`, and zeros for missing rows.

    They are a[found], or rows `first` to `end` if a is a descriptor.
    """
    if isinstance(a, tl.tensor_descriptor):
        return load_ragged(a, 0, end, [first, start])
    else:
        k = start + tl.arange(0, BK)
        mask = (found >= 0)[:, None] & within(k, K, BK)[None, :]
        return tl.load(a + found[:, None] * K + k[None, :], mask=mask, other=0.0)


@triton.jit
def columns(a, found, first, end, start, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Transposed rows of a tile, [BK, BM].

    They are loaded transposed, because sm_80 does not prefetch an operand that is transposed after its load.
    """
    if isinstance(a, tl.tensor_descriptor):
        return load_ragged(a, 0, end, [first, start]).T
    else:
        k = start + tl.arange(0, BK)
        mask = (found >= 0)[None, :] & within(k, K, BK)[:, None]
        return tl.load(a + found[None, :] * K + k[:, None], mask=mask, other=0.0)


@triton.jit
def unscaled(total, row_scale, found, column_scale, expert, column, N: tl.constexpr, BN: tl.constexpr):
    """A sum of products in float8, times the scales of its rows and columns [L, N]; unchanged without scales."""
    if row_scale is not None:
        total *= tl.load(row_scale + found, mask=found >= 0, other=0.0)[:, None]
    if column_scale is not None:
        by = tl.load(column_scale + expert * N + column, mask=within(column, N, BN), other=0.0)
        total *= by[None, :]
    return total


@triton.jit
def matrix(
    b,
    expert,
    start,
    across,
    K: tl.constexpr,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    """Tile [BK, BN] of b[expert] from row `start` and column `across`. b[expert] is [K, N], or [N, K] if TRANSPOSED."""
    if isinstance(b, tl.tensor_descriptor):
        if TRANSPOSED:
            return b.load([expert, across, start]).reshape(BN, BK).T
        else:
            return b.load([expert, start, across]).reshape(BK, BN)
    else:
        k = (start + tl.arange(0, BK))[:, None]
        n = (across + tl.arange(0, BN))[None, :]
        b += expert.to(tl.int64) * K * N
        at = k + n * K if TRANSPOSED else k * N + n
        return tl.load(b + at, mask=within(k, K, BK) & within(n, N, BN), other=0.0)


@triton.jit
def product(
    total,
    second,
    a,
    found,
    first,
    end,
    b,
    c,
    expert,
    across,
    K: tl.constexpr,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """total + rows of a times b[expert], and second + the same rows times c[expert] if c is given.

    Hopper sums products in float8 with 14 bits (DeepSeek-V3, arXiv:2412.19437, section 3.3.2). So each BK of them are
    added to a sum in float32.
    """
    for start in range(0, K, BK):
        left = rows(a, found, first, end, start, K, BM, BK)
        right = matrix(b, expert, start, across, K, N, TRANSPOSED, BK, BN)
        total = tl.dot(left, right, total, input_precision=PRECISION, max_num_imprecise_acc=BK)
        if c is not None:
            right = matrix(c, expert, start, across, K, N, TRANSPOSED, BK, BN)
            second = tl.dot(left, right, second, input_precision=PRECISION, max_num_imprecise_acc=BK)
    return total, second
