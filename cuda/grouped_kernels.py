# type: ignore (the language of Triton, which looks like Python)
"""The Triton kernels of `grouped.py`.

A program makes one tile [BM, BN] of a result and sums over BK at a time, in float32. Sizes that a model fixes are
constants of the kernel, so that masks fold away where tiles divide them; rows are 64-bit: there may be 2^31 elements.
"""

# ruff: noqa: RET505 (Triton leaves a branch out by its constant condition, but does not know that a return ends it)

from __future__ import annotations

import triton
import triton.language as tl

TOGETHER = tl.constexpr(8)  # row tiles that go through the columns of a weight while these are in L2


@triton.jit
def _place(num_m, num_n):
    """This program's tile: row, column."""
    program = tl.program_id(0)
    first = program // (TOGETHER * num_n) * TOGETHER
    height = tl.minimum(num_m - first, TOGETHER)
    program %= TOGETHER * num_n
    return first + program % height, program // height


@triton.jit
def _within(index, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """index < SIZE, known beforehand where blocks fill the size."""
    if SIZE % BLOCK == 0:
        return tl.full(index.shape, 1, tl.int1)
    else:
        return index < SIZE


@triton.jit
def _source(row, inside, token, GATHER: tl.constexpr):
    """Where a product's rows [BM] lie: int64, -1 = nowhere."""
    if GATHER:
        return tl.load(token + row, mask=inside, other=-1)
    else:
        return tl.where(inside, row, -1).to(tl.int64)


@triton.jit
def _product(
    total,
    second,
    a,
    source,
    b,
    c,
    column,
    K: tl.constexpr,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BOTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """total + a[source] b, and second + a[source] c if BOTH; b and c are [K, N], or lie as [N, K] if TRANSPOSED."""
    found = source >= 0
    wide = _within(column, N, BN)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        deep = _within(k, K, BK)
        left = tl.load(a + source[:, None] * K + k[None, :], mask=found[:, None] & deep[None, :], other=0.0)
        place = k[:, None] * N + column[None, :]
        if TRANSPOSED:
            place = k[:, None] + column[None, :] * K
        right = tl.load(b + place, mask=deep[:, None] & wide[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        if BOTH:
            right = tl.load(c + place, mask=deep[:, None] & wide[None, :], other=0.0)
            second = tl.dot(left, right, second, input_precision=PRECISION)
    return total, second


@triton.jit
def _activation(up, gate, ACTIVATION: tl.constexpr):
    """The hidden value, and its derivatives by up and by gate."""
    if ACTIVATION == "swiglu":
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        return silu * up, silu, up * (sigmoid + silu * (1 - sigmoid))
    elif ACTIVATION == "gelu":
        below = 0.5 * (1 + tl.erf(up * 0.7071067811865476))  # of a normal distribution; then its density
        return up * below, below + up * tl.exp(-0.5 * up * up) * 0.3989422804014327, gate
    else:
        return tl.where(up <= 0, 0.0, up), tl.where(up <= 0, 0.0, 1.0), gate  # as torch: NaN stays NaN


@triton.jit(do_not_specialize=["num_m"])
def up_kernel(
    x,
    token,
    weight,
    w_up,
    w_gate,
    tile_expert,
    tile_start,
    ends,
    up,
    gate,
    hidden,
    num_m,
    D: tl.constexpr,
    H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATHER: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """hidden [R, H] = weight * act(x[token] w_up, x[token] w_gate); x is read once for both products."""
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    m, n = _place(num_m, tl.cdiv(H, BN))
    expert = tl.load(tile_expert + m).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(tile_start + m) + tl.arange(0, BM)
    inside = row < tl.load(ends + expert)
    column = n * BN + tl.arange(0, BN)
    source = _source(row, inside, token, GATHER)
    zero = tl.zeros([BM, BN], tl.float32)
    w_up += expert * D * H
    w_gate += expert * D * H
    u, g = _product(zero, zero, x, source, w_up, w_gate, column, D, H, False, GATED, PRECISION, BN, BK)
    # Rounded as they are stored: the backward makes the hidden rows again from that, and they must be these.
    u = u.to(hidden.dtype.element_ty)
    g = g.to(hidden.dtype.element_ty)
    place = row.to(tl.int64)[:, None] * H + column[None, :]
    mask = inside[:, None] & _within(column, H, BN)[None, :]
    if SAVE:
        tl.store(up + place, u, mask=mask)
        if GATED:
            tl.store(gate + place, g, mask=mask)
    h, _, _ = _activation(u.to(tl.float32), g.to(tl.float32), ACTIVATION)
    h *= tl.load(weight + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    tl.store(hidden + place, h.to(hidden.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_m"])
def down_kernel(
    a,
    b,
    a2,
    b2,
    tile_expert,
    tile_start,
    ends,
    out,
    num_m,
    K: tl.constexpr,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PAIR: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out [R, N] = a b, and + a2 b2 if PAIR, of rows [R, K]; see `_product` for TRANSPOSED."""
    m, n = _place(num_m, tl.cdiv(N, BN))
    expert = tl.load(tile_expert + m).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(tile_start + m) + tl.arange(0, BM)
    inside = row < tl.load(ends + expert)
    column = n * BN + tl.arange(0, BN)
    source = _source(row, inside, a, False)
    total = tl.zeros([BM, BN], tl.float32)
    b += expert * K * N
    total, _ = _product(total, total, a, source, b, b, column, K, N, TRANSPOSED, False, PRECISION, BN, BK)
    if PAIR:
        b2 += expert * K * N
        total, _ = _product(total, total, a2, source, b2, b2, column, K, N, TRANSPOSED, False, PRECISION, BN, BK)
    mask = inside[:, None] & _within(column, N, BN)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * N + column[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_m", "rows"])
def hidden_kernel(
    grad,
    token,
    weight,
    w_down,
    tile_expert,
    tile_start,
    ends,
    up,
    gate,
    to_up,
    to_gate,
    hidden,
    to_weight,
    num_m,
    rows,
    D: tl.constexpr,
    H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """From the gradient grad[token] [R, D] to those of up, gate and weight, and the hidden rows again.

    to_weight is [ceil(H / BN), R]: each tile's part of the sum over H.
    """
    m, n = _place(num_m, tl.cdiv(H, BN))
    expert = tl.load(tile_expert + m).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(tile_start + m) + tl.arange(0, BM)
    inside = row < tl.load(ends + expert)
    column = n * BN + tl.arange(0, BN)
    source = _source(row, inside, token, GATHER)
    d = tl.zeros([BM, BN], tl.float32)
    w_down += expert * D * H
    d, _ = _product(d, d, grad, source, w_down, w_down, column, D, H, True, False, PRECISION, BN, BK)
    place = row.to(tl.int64)[:, None] * H + column[None, :]
    mask = inside[:, None] & _within(column, H, BN)[None, :]
    u = tl.load(up + place, mask=mask, other=0.0).to(tl.float32)
    g = u
    if ACTIVATION == "swiglu":
        g = tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
    h, by_up, by_gate = _activation(u, g, ACTIVATION)
    part = tl.sum(d * h, 1)
    tl.store(to_weight + n.to(tl.int64) * rows + row, part, mask=inside)
    scale = tl.load(weight + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    d *= scale
    dtype = hidden.dtype.element_ty
    tl.store(hidden + place, (h * scale).to(dtype), mask=mask)
    tl.store(to_up + place, (d * by_up).to(dtype), mask=mask)
    if ACTIVATION == "swiglu":
        tl.store(to_gate + place, (d * by_gate).to(dtype), mask=mask)


@triton.jit
def weight_kernel(
    a,
    b,
    c,
    a_token,
    b_token,
    ends,
    to_b,
    to_c,
    K: tl.constexpr,
    N: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    BOTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """to_b [L, K, N]: for each expert the sum over its rows of a[a_token]^T b[b_token]; to_c of c if BOTH."""
    m, n = _place(tl.cdiv(K, BM), tl.cdiv(N, BN))
    expert = tl.program_id(1)
    start = 0
    if expert > 0:
        start = tl.load(ends + expert - 1)
    end = tl.load(ends + expert)
    down = m * BM + tl.arange(0, BM)
    across = n * BN + tl.arange(0, BN)
    tall = _within(down, K, BM)
    wide = _within(across, N, BN)
    total = tl.zeros([BM, BN], tl.float32)
    second = total
    for first in range(start, end, BK):
        row = first + tl.arange(0, BK)
        inside = row < end
        from_a = _source(row, inside, a_token, GATHER_A)
        from_b = _source(row, inside, b_token, GATHER_B)
        left = tl.load(a + from_a[:, None] * K + down[None, :], mask=(from_a >= 0)[:, None] & tall[None, :], other=0.0)
        mask = (from_b >= 0)[:, None] & wide[None, :]
        right = tl.load(b + from_b[:, None] * N + across[None, :], mask=mask, other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
        if BOTH:
            right = tl.load(c + from_b[:, None] * N + across[None, :], mask=mask, other=0.0)
            second = tl.dot(tl.trans(left), right, second, input_precision=PRECISION)
    place = expert.to(tl.int64) * K * N + down.to(tl.int64)[:, None] * N + across[None, :]
    mask = tall[:, None] & wide[None, :]
    tl.store(to_b + place, total.to(to_b.dtype.element_ty), mask=mask)
    if BOTH:
        tl.store(to_c + place, second.to(to_c.dtype.element_ty), mask=mask)
