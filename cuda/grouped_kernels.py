# type: ignore (the language of Triton, which looks like Python)
"""The Triton kernels of `grouped.py`.

A program computes one tile [BM, BN] of a result in float32, in steps of BK. Sizes that the model fixes are constants of
the kernel, so masks vanish where tiles divide them. Row offsets are 64-bit, because there may be 2^31 elements.
ACTIVATION is a function of `activations.py`. An argument that an operation does not need (token, gate, biases) is None,
and the kernel is compiled without it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grouped_product import columns, place, product, rows, source, span, unscaled, within


@triton.jit(do_not_specialize=["num_m"])
def tiles_kernel(
    ends,
    tile_expert,
    tile_start,
    num_m,
    L: tl.constexpr,
    SIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BM: tl.constexpr,
):
    """Expert and first row of each of num_m tiles of SIZE rows; see `Tiles`. EXPERTS is a power of 2, at least L."""
    e = tl.arange(0, EXPERTS)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e < L), other=0)
    rows = tl.load(ends + e, mask=e < L, other=0) - tl.where(e < L, start, 0)
    until = tl.cumsum((rows + SIZE - 1) // SIZE, 0)  # tiles up to each expert, inclusive
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    before = (until[None, :] <= m[:, None]) & (e < L)[None, :]
    expert = tl.sum(before.to(tl.int32), 1)
    tile = m - tl.max(tl.where(before, until[None, :], 0), 1)  # number of the tile within its expert
    used = expert < L
    first = tl.load(ends + expert - 1, mask=used & (expert > 0), other=0)
    tl.store(tile_expert + m, tl.where(used, expert, -1), mask=m < num_m)
    tl.store(tile_start + m, tl.where(used, first + tile * SIZE, 0), mask=m < num_m)


@triton.jit(do_not_specialize=["num_m"])
def up_kernel(
    x,
    x_scale,
    token,
    weight,
    w_up,
    w_gate,
    up_scale,
    gate_scale,
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
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """hidden [R, H] = weight * act(x[token] w_up + b_up, x[token] w_gate + b_gate), with x read once for both."""
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
    u, g = product(u, u, x, found, first, end, w_up, w_gate, expert, n * BN, D, H, TRANSPOSED, PRECISION, BM, BN, BK)
    # Round as for storing: the backward recomputes the hidden rows from stored values, and must get the same rows.
    u = unscaled(u, x_scale, found, up_scale, expert, column, H, BN)
    if b_up is not None:
        u += tl.load(b_up + expert * H + column, mask=wide, other=0.0).to(tl.float32)[None, :]
    u = u.to(hidden.dtype.element_ty)
    if w_gate is not None:
        g = unscaled(g, x_scale, found, gate_scale, expert, column, H, BN)
        if b_gate is not None:
            g += tl.load(b_gate + expert * H + column, mask=wide, other=0.0).to(tl.float32)[None, :]
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
    a_scale,
    b_scale,
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
    """out [R, N] = a b + a2 b2 + weight * bias, for rows a and a2 [R, K]. See `matrix` for TRANSPOSED.

    a and a2 have the same scales in float8, and so have b and b2.
    """
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
    total = unscaled(total, a_scale, found, b_scale, expert, column, N, BN)
    if bias is not None:
        scale = tl.load(weight + row, mask=row < end, other=0.0).to(tl.float32)
        total += scale[:, None] * tl.load(bias + expert * N + column, mask=wide, other=0.0).to(tl.float32)[None, :]
    mask = (row < end)[:, None] & wide[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * N + column[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_m", "R"])
def hidden_kernel(
    grad,
    grad_scale,
    token,
    weight,
    w_down,
    down_scale,
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
    """From the gradient grad[token] [R, D], gradients of up, gate and weight, and the recomputed hidden rows.

    to_weight is [ceil(H / BN), R], with each tile's part of the sum over H.
    """
    m, n = place(num_m, tl.cdiv(H, BN))
    expert = tl.load(tile_expert + m)
    if expert < 0:
        return
    first = tl.load(tile_start + m)
    end = tl.load(ends + expert)
    row = first + tl.arange(0, BM)
    found = source(row, end, token)
    d = tl.zeros([BM, BN], tl.float32)
    d, _ = product(d, d, grad, found, first, end, w_down, None, expert, n * BN, D, H, True, PRECISION, BM, BN, BK)
    d = unscaled(d, grad_scale, found, None, expert, found, H, BN)  # and the columns' scales part by part
    inside = row < end
    scale = tl.load(weight + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    dtype = hidden.dtype.element_ty
    dots = tl.zeros([BM], tl.float32)
    # The epilogue holds six values for each element of d. In four parts of its columns, they need no spilled registers.
    halves = tl.split(tl.permute(tl.reshape(d, (BM, 2, BN // 2)), (0, 2, 1)))
    for i in tl.static_range(2):
        quarters = tl.split(tl.permute(tl.reshape(halves[i], (BM, 2, BN // 4)), (0, 2, 1)))
        for j in tl.static_range(2):
            column = n * BN + (2 * i + j) * (BN // 4) + tl.arange(0, BN // 4)
            part = unscaled(quarters[j], None, found, down_scale, expert, column, H, BN)
            at = row.to(tl.int64)[:, None] * H + column[None, :]
            mask = inside[:, None] & within(column, H, BN)[None, :]
            u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
            g = u
            if gate is not None:
                g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
            h, by_up, by_gate = ACTIVATION(u, g)
            dots += tl.sum(part * h, 1)
            part *= scale
            tl.store(hidden + at, (h * scale).to(dtype), mask=mask)
            tl.store(to_up + at, (part * by_up).to(dtype), mask=mask)
            if gate is not None:
                tl.store(to_gate + at, (part * by_gate).to(dtype), mask=mask)
    tl.store(to_weight + n.to(tl.int64) * R + row, dots, mask=inside)


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
    """to_b [L, K, N]: a[a_token]^T b[b_token] summed over the rows of each expert; to_c the same for c, if given."""
    m, n = place(tl.cdiv(K, BM), tl.cdiv(N, BN))
    expert = tl.program_id(1)
    start, end = span(ends, expert)
    total = tl.zeros([BM, BN], tl.float32)
    second = total
    # Load indices one block ahead. An index load right before its row load would take one of the pipeline's stages.
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
    """to_bias [L, N]: weight * a[token] summed over the rows of each expert, for a [R, N]. Without weight, a alone.

    With weight, also to_weight [ceil(N / BN), R], with each tile's part of the product of a[token] and bias [L, N].
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
