"""The experts' perceptrons on a CPU, one expert at a time: what lies between two products stays in the cache.

Of the hidden rows, only what the activation is taken of is kept. The rest is made for one expert, used while
it lies in the cache, and made again in the backward: that costs less than memory would, where every page of a
large buffer has to be faulted in, written, and read again. Where an allocator keeps its pages, it saves memory alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch.ops import wide
from ..dispatch.plan import Plan
from .activation import ACTIVATIONS, blocks
from .grouped_mm import computed, mm, spans

_BLOCK = 1 << 18  # elements: a few temporaries of them fit a cache, and the calls that make them do not weigh
Layer = tuple[Tensor, Tensor | None]  # weight [L, in, out] and bias [L, out], of the dtype of rows


def pays(rows: int, experts: int, dim: int, hidden: int) -> bool:
    """Whether one at a time is faster: rows take many pages, and experts work enough for the calls each needs."""
    return rows * max(dim, hidden) >= 1 << 22 and rows * hidden >= experts << 16


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
        hidden = rows.new_empty(most, w_down.shape[1], dtype=computed(rows))
        out = _Out(rows, counts, plan)
        take = _taker(rows, counts, plan)
        for e, span in spans(counts.cumsum(0)):
            x, w = take(rows, span), weight[span].unsqueeze(1)
            h, us = hidden[: len(x)], [u[span] if kept else u[: len(x)] for u in before]
            for u, matrix, bias in zip(us, up[::2], up[1::2], strict=True):
                mm(x, matrix[e], out=u)
                if bias is not None:
                    u.add_(bias[e])
            for h_, w_, *us_ in blocks(h, w, *us, elements=_BLOCK):
                torch.mul(_activated(activation, *map(wide, us_)), w_, out=h_)
            y = out.at(span)
            mm(h, w_down[e], out=y)
            if b_down is not None:
                y.copy_(torch.addcmul(wide(y), w, wide(b_down[e])))
            out.add(span)
        ctx.activation, ctx.plan = activation, plan
        ctx.save_for_backward(rows, weight, counts, w_down, b_down, *up, *before)
        return out.done()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weight, counts, w_down, b_down, *rest = ctx.saved_tensors
        number = len(rest) // 3  # of layers below the activation
        up, before = rest[: 2 * number], rest[2 * number :]
        needed = iter(ctx.needs_input_grad)
        to_rows = _Out(rows, counts, ctx.plan) if next(needed) else None
        to_weight = torch.zeros_like(weight)
        to_w_down, to_b_down, *to_up = (
            torch.empty_like(t) if need else None for t, need in zip((w_down, b_down, *up), [*needed][4:], strict=True)
        )
        room, dtype = (_most(counts), w_down.shape[1]), computed(rows)
        hidden, *slopes = (rows.new_empty(room, dtype=dtype) for _ in range(1 + number))
        take_x, take_y = _taker(rows, counts, ctx.plan), _taker(rows, counts, ctx.plan)
        for e, span in spans(counts.cumsum(0)):
            x, y, w = take_x(rows, span), take_y(grad, span), weight[span].unsqueeze(1)
            h, *dus = (t[: len(x)] for t in (hidden, *slopes))
            mm(y, w_down[e].T, out=dus[0])
            for h_, w_, dw_, *both in blocks(h, w, to_weight[span], *dus, *(u[span] for u in before), elements=_BLOCK):
                d, us_ = wide(both[0]), map(wide, both[number:])
                a, *slopes_ = _back(ctx.activation, d * w_, *us_)
                torch.mul(a, w_, out=h_)
                dw_.copy_(a.mul_(d).sum(1))
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
                    mm(du, matrix[e].T, out=to_rows.at(span), add=j > 0)
                if to_matrix is not None:
                    mm(x.T, du, out=to_matrix[e])
                if to_bias is not None:
                    to_bias[e] = du.sum(0)
            if to_rows is not None:
                to_rows.add(span)
        return to_rows and to_rows.done(), to_weight, None, None, None, to_w_down, to_b_down, *to_up


class _Out:
    """Where an expert's rows [R, D] go: side by side, or with a plan into the sums of its tokens [T, D]."""

    def __init__(self, rows: Tensor, counts: Tensor, plan: Plan | None) -> None:
        self.plan, self.dtype = plan, rows.dtype
        if plan is None:
            self.rows = torch.empty_like(rows)
        else:
            self.rows = rows.new_empty(_most(counts), rows.shape[1], dtype=computed(rows))  # of one expert
            self.sums = torch.zeros_like(rows, dtype=torch.promote_types(rows.dtype, torch.float32))

    def at(self, span: slice) -> Tensor:
        """The place to write rows to."""
        return self.rows[span] if self.plan is None else self.rows[: span.stop - span.start]

    def add(self, span: slice) -> None:
        """They are written: no token is twice among them, so that sums have one order, that of the experts."""
        if self.plan is not None:
            self.sums.index_add_(0, self.plan.token[span], wide(self.at(span)))

    def done(self) -> Tensor:
        """[R, D], or [T, D]."""
        return self.rows if self.plan is None else self.sums.to(self.dtype)


def _most(counts: Tensor) -> int:
    return int(counts.max()) if len(counts) else 0


def _taker(rows: Tensor, counts: Tensor, plan: Plan | None) -> Callable[[Tensor, slice], Tensor]:
    """A function of rows and a span, one expert's rows, good until its next call: with a plan they share memory."""
    dtype = computed(rows)
    if plan is None:
        return lambda rows, span: rows[span].to(dtype)
    room = rows.new_empty(_most(counts), rows.shape[1])

    def take(rows: Tensor, span: slice) -> Tensor:
        return torch.index_select(rows, 0, plan.token[span], out=room[: span.stop - span.start]).to(dtype)

    return take


def _activated(activation: str, up: Tensor, gate: Tensor | None = None) -> Tensor:
    act = ACTIVATIONS[activation]
    return act(up) if gate is None else act(gate).mul_(up)


def _back(activation: str, grad: Tensor, up: Tensor, gate: Tensor | None = None) -> tuple[Tensor, ...]:
    """What `_activated` returns, again, and from its gradient the gradients of what it was given."""
    if gate is not None:
        act = F.silu(gate)
        return act * up, grad * act, torch.ops.aten.silu_backward(grad * up, gate)
    if activation == "gelu":
        return F.gelu(up), torch.ops.aten.gelu_backward(grad, up)
    return F.relu(up), torch.ops.aten.threshold_backward(grad, up, 0)
