# type: ignore (the language of Triton, which looks like Python)
"""The Triton kernels of `grouped.py`.

A program makes one tile [BM, BN] of a result and sums over BK at a time, in float32. Sizes that a model fixes are
constants of the kernel, so that masks fold away where tiles divide them; rows are 64-bit: there may be 2^31 elements.
ACTIVATION is a function of `activations.py`.
What an operation goes without (token, gate, biases) is None, and no code is made for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grouped_product import columns, place, product, rows, source, span, within


@triton.jit(do_not_specialize=["num_m"])
def up_kernel(
    x,
    token,
    weight,
    w_up,
    w_gate,
    b_up,
    b_gate,
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
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """hidden [R, H] = weight * act(x[token] w_up + b_up, x[token] w_gate + b_gate); x is read once for both."""
    m, n = place(num_m, tl.cdiv(H, BN))
    expert = tl.load(tile_expert + m)
    if expert < 0:
        return
    first = tl.load(tile_start + m)
    end = tl.load(ends + expert)
    row = first + tl.arange(0, BM)
    column = n * BN + tl.arange(0, BN)
    wide = within(column, H, BN)
    found = source(row, end, token)
    u = tl.zeros([BM, BN], tl.float32)
    u, g = product(u, u, x, found, first, end, w_up, w_gate, expert, n * BN, D, H, False, PRECISION, BM, BN, BK)
    if b_up is not None:
        u += tl.load(b_up + expert * H + column, mask=wide, other=0.0).to(tl.float32)[None, :]
        if b_gate is not None:
            g += tl.load(b_gate + expert * H + column, mask=wide, other=0.0).to(tl.float32)[None, :]
    # Rounded as they are stored: the backward makes the hidden rows again from that, and they must be these.
    u = u.to(hidden.dtype.element_ty)
    g = g.to(hidden.dtype.element_ty)
    at = row.to(tl.int64)[:, None] * H + column[None, :]
    mask = (row < end)[:, None] & wide[None, :]
    if SAVE:
        tl.store(up + at, u, mask=mask)
        if w_gate is not None:
            tl.store(gate + at, g, mask=mask)
    h, _, _ = ACTIVATION(u.to(tl.float32), g.to(tl.float32))
    h *= tl.load(weight + row, mask=row < end, other=0.0).to(tl.float32)[:, None]
    tl.store(hidden + at, h.to(hidden.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_m"])
def down_kernel(
    a,
    b,
    a2,
    b2,
    bias,
    weight,
    tile_expert,
    tile_start,
    ends,
    out,
    num_m,
    K: tl.constexpr,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out [R, N] = a b + a2 b2 + weight * bias, of rows [R, K]; see `matrix` for TRANSPOSED."""
    m, n = place(num_m, tl.cdiv(N, BN))
    expert = tl.load(tile_expert + m)
    if expert < 0:
        return
    first = tl.load(tile_start + m)
    end = tl.load(ends + expert)
    row = first + tl.arange(0, BM)
    column = n * BN + tl.arange(0, BN)
    wide = within(column, N, BN)
    found = source(row, end, None)
    total = tl.zeros([BM, BN], tl.float32)
    total, _ = product(
        total, total, a, found, first, end, b, None, expert, n * BN, K, N, TRANSPOSED, PRECISION, BM, BN, BK
    )
    if a2 is not None:
        total, _ = product(
            total, total, a2, found, first, end, b2, None, expert, n * BN, K, N, TRANSPOSED, PRECISION, BM, BN, BK
        )
    if bias is not None:
        scale = tl.load(weight + row, mask=row < end, other=0.0).to(tl.float32)
        total += scale[:, None] * tl.load(bias + expert * N + column, mask=wide, other=0.0).to(tl.float32)[None, :]
    mask = (row < end)[:, None] & wide[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * N + column[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_m", "R"])
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
    R,
    D: tl.constexpr,
    H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """From the gradient grad[token] [R, D] to those of up, gate and weight, and the hidden rows again.

    to_weight is [ceil(H / BN), R]: each tile's part of the sum over H.
    """
    m, n = place(num_m, tl.cdiv(H, BN))
    expert = tl.load(tile_expert + m)
    if expert < 0:
        return
    first = tl.load(tile_start + m)
    end = tl.load(ends + expert)
    row = first + tl.arange(0, BM)
    column = n * BN + tl.arange(0, BN)
    found = source(row, end, token)
    d = tl.zeros([BM, BN], tl.float32)
    d, _ = product(d, d, grad, found, first, end, w_down, None, expert, n * BN, D, H, True, PRECISION, BM, BN, BK)
    at = row.to(tl.int64)[:, None] * H + column[None, :]
    inside = row < end
    mask = inside[:, None] & within(column, H, BN)[None, :]
    u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    g = u
    if gate is not None:
        g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    h, by_up, by_gate = ACTIVATION(u, g)
    tl.store(to_weight + n.to(tl.int64) * R + row, tl.sum(d * h, 1), mask=inside)
    scale = tl.load(weight + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    d *= scale
    dtype = hidden.dtype.element_ty
    tl.store(hidden + at, (h * scale).to(dtype), mask=mask)
    tl.store(to_up + at, (d * by_up).to(dtype), mask=mask)
    if gate is not None:
        tl.store(to_gate + at, (d * by_gate).to(dtype), mask=mask)


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
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """to_b [L, K, N]: for each expert the sum over its rows of a[a_token]^T b[b_token]; to_c of c, if there is one."""
    m, n = place(tl.cdiv(K, BM), tl.cdiv(N, BN))
    expert = tl.program_id(1)
    start, end = span(ends, expert)
    total = tl.zeros([BM, BN], tl.float32)
    second = total
    # Looked up a block ahead: as a load within a load, it would take one of the loads under way.
    row = start + tl.arange(0, BK)
    from_a, from_b = source(row, end, a_token), source(row, end, b_token)
    for first in range(start, end, BK):
        left = columns(a, from_a, first, end, m * BM, K, BK, BM)
        total = tl.dot(left, rows(b, from_b, first, end, n * BN, N, BK, BN), total, input_precision=PRECISION)
        if c is not None:
            second = tl.dot(left, rows(c, from_b, first, end, n * BN, N, BK, BN), second, input_precision=PRECISION)
        row += BK
        from_a, from_b = source(row, end, a_token), source(row, end, b_token)
    down = m * BM + tl.arange(0, BM)
    across = n * BN + tl.arange(0, BN)
    at = (expert.to(tl.int64) * K + down[:, None]) * N + across[None, :]
    mask = within(down, K, BM)[:, None] & within(across, N, BN)[None, :]
    tl.store(to_b + at, total.to(to_b.dtype.element_ty), mask=mask)
    if c is not None:
        tl.store(to_c + at, second.to(to_c.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def bias_kernel(
    a,
    token,
    weight,
    bias,
    ends,
    to_bias,
    to_weight,
    R,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """to_bias [L, N]: for each expert the sum over its rows of weight * a[token], a [R, N]; without weight, of a.

    With weight also to_weight [ceil(N / BN), R], from a[token] and bias [L, N]: each tile's part of their product.
    """
    n = tl.program_id(0)
    expert = tl.program_id(1)
    start, end = span(ends, expert)
    column = n * BN + tl.arange(0, BN)
    wide = within(column, N, BN)
    total = tl.zeros([BN], tl.float32)
    for first in range(start, end, BM):
        row = first + tl.arange(0, BM)
        tile = rows(a, source(row, end, token), first, end, n * BN, N, BM, BN).to(tl.float32)
        if weight is not None:
            by = tl.load(bias + expert * N + column, mask=wide, other=0.0).to(tl.float32)
            tl.store(to_weight + n.to(tl.int64) * R + row, tl.sum(tile * by[None, :], 1), mask=row < end)
            tile *= tl.load(weight + row, mask=row < end, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(tile, 0)
    tl.store(to_bias + expert * N + column, total.to(to_bias.dtype.element_ty), mask=wide)
