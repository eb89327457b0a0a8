# type: ignore (the language of Triton, which looks like Python)
"""Triton kernels that round rows and columns to float8 (e4m3), each with a scale of its own. See `scaling.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from .grouped_product import within


@triton.jit
def magnitude(x):
    """|x| as the bits of float32. As integers they are in the order of the numbers, and NaN is above infinity."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scales(largest):
    """A power of two for each largest magnitude, and its inverse: magnitudes times the inverse are at most 448.

    The carry of the addition tells mantissas above 1.75 = 448 / 256. The scale of infinity and NaN is NaN. The
    smallest scale is 2^-126, for rows of zeros too.
    """
    exponent = tl.maximum((largest + 0x1FFFFF) >> 23, 9) - 8
    scale = tl.where(largest < 0x7F800000, exponent << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    return scale, ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def rows_kernel(
    a,
    b,
    ends,
    to_a,
    to_b,
    scale,
    R,
    L: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Rows of a, and of b if given, [R, K], to float8 with one scale [R] for both. With `ends`, rows past the last end
    are left out.
    """
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    end = R
    if ends is not None:
        end = tl.load(ends + L - 1)
    if tl.program_id(0) * BM >= end:
        return
    inside = (row < end)[:, None]
    largest = tl.zeros([BM], tl.int32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        at, mask = row[:, None] * K + k[None, :], inside & within(k, K, BK)[None, :]
        largest = tl.maximum(largest, tl.max(magnitude(tl.load(a + at, mask=mask, other=0.0)), 1))
        if b is not None:
            largest = tl.maximum(largest, tl.max(magnitude(tl.load(b + at, mask=mask, other=0.0)), 1))
    by, inverse = scales(largest)
    tl.store(scale + row, by, mask=row < end)
    for start in range(0, K, BK):  # the cache has what was read just now
        k = start + tl.arange(0, BK)
        at, mask = row[:, None] * K + k[None, :], inside & within(k, K, BK)[None, :]
        tile = tl.load(a + at, mask=mask, other=0.0).to(tl.float32) * inverse[:, None]
        tl.store(to_a + at, tile.to(to_a.dtype.element_ty), mask=mask)
        if b is not None:
            tile = tl.load(b + at, mask=mask, other=0.0).to(tl.float32) * inverse[:, None]
            tl.store(to_b + at, tile.to(to_b.dtype.element_ty), mask=mask)


@triton.jit
def columns_kernel(a, to_a, scale, K: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):
    """Columns of each matrix of a [L, K, N] to float8 with a scale [L, N] each, stored transposed, [L, N, K]."""
    expert = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    wide = within(n, N, BN)
    a += expert * K * N
    to_a += expert * K * N
    largest = tl.zeros([BN], tl.int32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        mask = within(k, K, BK)[:, None] & wide[None, :]
        tile = tl.load(a + k[:, None] * N + n[None, :], mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.max(magnitude(tile), 0))
    by, inverse = scales(largest)
    tl.store(scale + expert * N + n, by, mask=wide)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        mask = within(k, K, BK)[:, None] & wide[None, :]
        tile = tl.load(a + k[:, None] * N + n[None, :], mask=mask, other=0.0).to(tl.float32) * inverse[None, :]
        tl.store(to_a + n[:, None] * K + k[None, :], tile.to(to_a.dtype.element_ty).T, mask=mask.T)
