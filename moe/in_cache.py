"""The experts' perceptrons on a CPU, one expert at a time: what lies between two products stays in the cache.

Of the hidden rows, only what the activation is taken of is kept. The rest is made for one expert, used while
it lies in the cache, and made again in the backward: that costs less than memory would, where every page of a
large buffer has to be faulted in, written, and read again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch.ops import decode
from ..dispatch.plan import Plan
from .activation import ACTIVATIONS, blocks, wide
from .grouped_mm import mm, spans

Layer = tuple[Tensor, Tensor | None]  # weight [L, in, out] and bias [L, out], of the dtype of rows


def perceptrons(
    rows: Tensor, weight: Tensor, counts: Tensor, activation: str, up: list[Layer], down: Layer, plan: Plan | None
) -> Tensor:
    """Weighted rows [R, D]: rows [R, D] sorted by expert, weight [R] float32 or wider, counts int64 [L].

    `up` has one layer, or for "swiglu" two, the gate being the second. The gate's weight multiplies the hidden row:
    W_down (w a) = w W_down a. With a `plan`, rows are its tokens [T, D], and so is what comes back: those of an expert
    are gathered when it is its turn, and all [R, D] never exist.
    """
    tensors = [tensor for layer in (down, *up) for tensor in layer]
    return _Perceptrons.apply(rows, weight, counts, activation, plan, *tensors)  # pyright: ignore[reportReturnType]


class _Perceptrons(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, counts, activation, plan, w_down, b_down, *up):
        kept, most = any(ctx.needs_input_grad), _most(counts)
        before = [rows.new_empty(len(weight) if kept else most, w_down.shape[1]) for _ in up[::2]]
        hidden, out = rows.new_empty(most, w_down.shape[1]), rows.new_empty(len(weight), rows.shape[1])
        for e, span in spans(counts.cumsum(0)):
            x, w = _rows_of(rows, span, plan), weight[span].unsqueeze(1)
            h, us = hidden[: len(x)], [u[span] if kept else u[: len(x)] for u in before]
            for u, matrix, bias in zip(us, up[::2], up[1::2], strict=True):
                mm(x, matrix[e], out=u)
                if bias is not None:
                    u.add_(bias[e])
            for h_, w_, *us_ in blocks(h, w, *us):
                torch.mul(_activated(activation, *map(wide, us_)), w_, out=h_)
            mm(h, w_down[e], out=out[span])
            if b_down is not None:
                out[span] = torch.addcmul(wide(out[span]), w, wide(b_down[e]))
        ctx.activation, ctx.plan = activation, plan
        ctx.save_for_backward(rows, weight, counts, w_down, b_down, *up, *before)
        return out if plan is None else decode(out, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weight, counts, w_down, b_down, *rest = ctx.saved_tensors
        number = len(rest) // 3  # of layers below the activation
        up, before = rest[: 2 * number], rest[2 * number :]
        needed = iter(ctx.needs_input_grad)
        to_rows = rows.new_empty(len(weight), rows.shape[1]) if next(needed) else None
        to_weight = torch.zeros_like(weight)
        to_w_down, to_b_down, *to_up = (
            torch.empty_like(t) if need else None for t, need in zip((w_down, b_down, *up), [*needed][4:], strict=True)
        )
        hidden, *slopes = (rows.new_empty(_most(counts), w_down.shape[1]) for _ in range(1 + number))
        for e, span in spans(counts.cumsum(0)):
            x, y, w = _rows_of(rows, span, ctx.plan), _rows_of(grad, span, ctx.plan), weight[span].unsqueeze(1)
            h, *dus = (t[: len(x)] for t in (hidden, *slopes))
            mm(y, w_down[e].T, out=dus[0])
            for h_, w_, dw_, *both in blocks(h, w, to_weight[span], *dus, *(u[span] for u in before)):
                d, us_ = wide(both[0]), map(wide, both[number:])
                a, *slopes_ = _back(ctx.activation, d * w_, *us_)
                torch.mul(a, w_, out=h_)
                torch.sum(a.mul_(d), 1, out=dw_)
                for du_, slope in zip(both[:number], slopes_, strict=True):
                    du_.copy_(slope)
            if b_down is not None:
                to_weight[span] += (wide(y) * b_down[e]).sum(1)
            if to_b_down is not None:
                to_b_down[e] = (y * w).sum(0)
            if to_w_down is not None:
                mm(h.T, y, out=to_w_down[e])
            for j, du in enumerate(dus):
                matrix, to_matrix, to_bias = up[2 * j], to_up[2 * j], to_up[2 * j + 1]
                if to_rows is not None:
                    mm(du, matrix[e].T, out=to_rows[span], add=j > 0)
                if to_matrix is not None:
                    mm(x.T, du, out=to_matrix[e])
                if to_bias is not None:
                    to_bias[e] = du.sum(0)
        if ctx.plan is not None and to_rows is not None:
            to_rows = decode(to_rows, ctx.plan)
        return to_rows, to_weight, None, None, None, to_w_down, to_b_down, *to_up


def _most(counts: Tensor) -> int:
    return int(counts.max()) if len(counts) else 0


def _rows_of(rows: Tensor, span: slice, plan: Plan | None) -> Tensor:
    """One expert's rows."""
    return rows[span] if plan is None else rows.index_select(0, plan.token[span])


def _activated(activation: str, up: Tensor, gate: Tensor | None = None) -> Tensor:
    act = ACTIVATIONS[activation]
    return act(up) if gate is None else act(gate).mul_(up)


def _back(activation: str, grad: Tensor, up: Tensor, gate: Tensor | None = None) -> tuple[Tensor, ...]:
    """What `_activated` returns, again, and from its gradient the gradients of what it was given."""
    if gate is not None:
        act = F.silu(gate)
        return act * up, grad * act, torch.ops.aten.silu_backward(grad * up, gate)
    slope = torch.ops.aten.gelu_backward(grad, up) if activation == "gelu" else grad * (up > 0)
    return ACTIVATIONS[activation](up), slope
