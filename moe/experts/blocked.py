"""Feed-forward experts on a CPU, a group of experts at a time, so that intermediate results stay in the cache.

Only the inputs of the activation are saved for backward. Everything else is computed for one group, used while it is in
the cache, and computed again in the backward. This is faster where the pages of a large buffer are faulted in each
time. Where the allocator keeps its pages, all experts at once are faster. Groups are used instead of single experts so
that gathers, sums and activations are a few calls on many rows, however small an expert is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dispatch.plan import Plan
from ...dispatch.reorder import decode, encode, encode_weight, wide
from ...dispatch.torch_internals import transformed
from .activation import ACTIVATIONS, Activation, blocks, differentiated
from .grouped_mm import computed, mm, sum_rows

_LARGE = 1 << 25  # bytes: glibc maps larger buffers anew each time, and learns to keep smaller ones
_GROUP = 1 << 21  # elements of a group's widest buffer: it has four, of 8 MiB each in float32
Layer = tuple[Tensor, Tensor | None]  # weight [L, in, out] and bias [L, out], in the dtype of rows


def pays(rows: Tensor, number: int, width: int) -> bool:
    """Whether groups of experts are faster than all at once, for `number` rows of `width`, computed like `rows`.

    They are faster if a buffer for all rows is so large that its pages are faulted in each time. The allocator keeps
    smaller buffers, and some allocators keep all. Then computing again in the backward costs more than it saves.
    """
    large = rows.device.type == "cpu" and number * width * computed(rows).itemsize >= _LARGE
    return large and _faulted_anew()


@cache
def _faulted_anew() -> bool:
    """Whether the pages of a freed large buffer go back to the kernel. It is measured: allocators do not tell."""
    if sys.platform == "win32":  # Windows does not count page faults
        return True
    import resource

    size, counts = _LARGE + _LARGE // 8, []
    whose = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)  # only Linux counts for each thread
    for _ in range(3):
        before = resource.getrusage(whose).ru_minflt
        len(b"\1" * size)  # fill a buffer, then free it
        counts.append(resource.getrusage(whose).ru_minflt - before)
    return min(counts) > size // resource.getpagesize() // 2


def perceptrons(
    x: Tensor, weight: Tensor, counts: Tensor, activation: str, ups: list[Layer], down: Layer, plan: Plan | None
) -> Tensor:
    """Weighted output of all experts: rows [R, D] -> [R, D], or with a `plan` tokens [T, D] -> [T, D].

    Arguments are as in `fused`. The router's weight multiplies the hidden row: W_down (w a) = w W_down a. With a plan,
    rows are gathered for one group at a time, so that the tensor of all rows [R, D] never exists.
    """
    if plan is not None:
        weight = encode_weight(weight, plan)
        if plan.capacity is not None:  # padding rows belong to no token, and cannot be gathered
            return decode(perceptrons(encode(x, plan), weight, counts, activation, ups, down, None), plan)
    kind, tensors = ACTIVATIONS[activation], [tensor for layer in (down, *ups) for tensor in layer]
    graph = torch.is_grad_enabled()  # asked here, because it is always off inside an autograd.Function
    return _Perceptrons.apply(x, weight, counts, kind, plan, graph, *tensors)  # pyright: ignore[reportReturnType]


class Group(NamedTuple):
    """Adjacent experts and their rows."""

    rows: slice
    experts: slice
    sizes: list[int]  # rows of each expert


def groups(counts: Tensor, width: int, elements: int) -> list[Group]:
    """Cut the experts into groups of adjacent ones, whose rows of `width` have at most `elements` elements together.

    An expert with more elements is a group by itself.

    >>> [group.sizes for group in groups(torch.tensor([3, 0, 2, 9, 1]), width=4, elements=20)]
    [[3, 0, 2], [9], [1]]
    """
    sizes, found = counts.tolist(), []
    e = row = 0
    while e < len(sizes):
        last, end = e + 1, row + sizes[e]
        while last < len(sizes) and (end + sizes[last] - row) * width <= elements:
            last, end = last + 1, end + sizes[last]
        found.append(Group(slice(row, end), slice(e, last), sizes[e:last]))
        e, row = last, end
    return found


class _Perceptrons(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, counts, kind, plan, graph, w_down, b_down, *up):
        kept, hidden_width = graph and any(ctx.needs_input_grad), w_down.shape[1]
        all_groups = groups(counts, max(w_down.shape[1:]), _GROUP)
        most = _most(all_groups)
        before = [rows.new_empty(len(weight) if kept else most, hidden_width) for _ in up[::2]]
        hidden = rows.new_empty(most, hidden_width, dtype=computed(rows))
        out = _Output(rows, most, plan)
        take = _gatherer(rows, most, plan)
        for span, few, sizes in all_groups:
            x, w = take(rows, span), weight[span].unsqueeze(1)
            h, us = hidden[: len(x)], [u[span] if kept else u[: len(x)] for u in before]
            for u, matrix, bias in zip(us, up[::2], up[1::2], strict=True):
                products(x.split(sizes), matrix[few], u.split(sizes))
                if bias is not None:
                    for u_, b in zip(u.split(sizes), bias[few], strict=True):
                        u_.add_(b)
            for h_, w_, *us_ in blocks(h, w, *us):
                torch.mul(kind.write(h_, *map(wide, us_)), w_, out=h_)
            y = out.at(span)
            products(h.split(sizes), w_down[few], y.split(sizes))
            if b_down is not None:
                for y_, w_, b in zip(y.split(sizes), w.split(sizes), b_down[few], strict=True):
                    y_.copy_(torch.addcmul(wide(y_), w_, wide(b)))
            out.add(span)
        ctx.kind, ctx.plan, ctx.all_groups = kind, plan, all_groups
        ctx.save_for_backward(rows, weight, w_down, b_down, *up, *before)
        return out.done()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weight, w_down, b_down, *rest = ctx.saved_tensors
        number = len(rest) // 3  # layers before the activation: up, and gate if there is one
        up, before = rest[: 2 * number], rest[2 * number :]
        if torch.is_grad_enabled() or transformed(grad):
            again = partial(_differentiable, ctx.kind, ctx.plan, ctx.all_groups)
            needs = ctx.needs_input_grad[:2] + ctx.needs_input_grad[6:]
            to_rows, to_weight, *others = differentiated(again, [rows, weight, w_down, b_down, *up], needs, grad)
            return to_rows, to_weight, None, None, None, None, *others
        most = _most(ctx.all_groups)
        needs_rows, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        to_rows = _Output(rows, most, ctx.plan) if needs_rows else None
        to_weight = torch.zeros_like(weight)
        to_w_down, to_b_down, *to_up = (
            torch.empty_like(t) if need else None for t, need in zip((w_down, b_down, *up), needs, strict=True)
        )
        dtype = computed(rows)
        hidden, *slopes = (rows.new_empty(most, w_down.shape[1], dtype=dtype) for _ in range(1 + number))
        take_x, take_y = _gatherer(rows, most, ctx.plan), _gatherer(rows, most, ctx.plan)
        learns = any(t is not None for t in to_up[::2])  # frozen experts do not need their rows again
        for span, few, sizes in ctx.all_groups:
            y, w = take_y(grad, span), weight[span].unsqueeze(1)
            xs = take_x(rows, span).split(sizes) if learns else ()
            h, *dus = (t[: len(y)] for t in (hidden, *slopes))
            ys, hs = y.split(sizes), h.split(sizes)
            products(ys, w_down[few].mT, dus[0].split(sizes))
            for h_, w_, dw_, *both in blocks(h, w, to_weight[span], *dus, *(u[span] for u in before)):
                d = wide(both[0])
                a, *slopes_ = ctx.kind.backward(d, *map(wide, both[number:]))
                torch.mul(a, w_, out=h_)
                dw_.copy_(a.mul_(d).sum(1))
                for du_, slope in zip(both[:number], slopes_, strict=True):
                    torch.mul(slope, w_, out=du_)
            if b_down is not None:
                for dw_, y_, b in zip(to_weight[span].split(sizes), ys, b_down[few], strict=True):
                    dw_ += (wide(y_) * b).sum(1)
            if to_b_down is not None:
                for to_b, y_, w_ in zip(to_b_down[few], ys, w.split(sizes), strict=True):
                    sum_rows(y_ * w_, to_b)
            if to_w_down is not None:
                products((h_.T for h_ in hs), ys, to_w_down[few])
            for j, du in enumerate(dus):
                matrix, to_matrix, to_bias = up[2 * j], to_up[2 * j], to_up[2 * j + 1]
                parts = du.split(sizes)
                if to_rows is not None:
                    products(parts, matrix[few].mT, to_rows.at(span).split(sizes), add=j > 0)
                if to_matrix is not None:
                    products((x_.T for x_ in xs), parts, to_matrix[few])
                if to_bias is not None:
                    for to_b, part in zip(to_bias[few], parts, strict=True):
                        sum_rows(part, to_b)
            if to_rows is not None:
                to_rows.add(span)
        return to_rows and to_rows.done(), to_weight, None, None, None, None, to_w_down, to_b_down, *to_up


def _differentiable(
    kind: Activation,
    plan: Plan | None,
    all_groups: list[Group],
    rows: Tensor,
    weight: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    *up: Any,
) -> Tensor:
    """The same as `_Perceptrons`, one expert at a time and with differentiable operators."""
    sizes = [size for group in all_groups for size in group.sizes]
    R, made = sum(sizes), []
    x = rows[:R] if plan is None else rows[plan.token[:R]]
    for e, (x_, w_) in enumerate(zip(x.split(sizes), weight[:R].unsqueeze(1).split(sizes), strict=True)):
        hidden = kind(*(_linear(wide(x_), e, *layer) for layer in zip(up[::2], up[1::2], strict=True)))
        made.append(_linear(hidden, e, w_down, b_down) * w_)
    y = torch.cat(made).to(rows.dtype)
    if plan is None:
        return F.pad(y, (0, 0, 0, len(rows) - R))
    return torch.zeros_like(rows, dtype=wide(y).dtype).index_add(0, plan.token[:R], wide(y)).to(rows.dtype)


def _linear(x: Tensor, expert: int, matrix: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ wide(matrix[expert])
    return y if bias is None else y + wide(bias[expert])


class _Output:
    """Output buffer for each group's rows: all rows [R, D], or with a plan the sums of each token's rows [T, D]."""

    def __init__(self, rows: Tensor, most: int, plan: Plan | None) -> None:
        self.plan, self.dtype = plan, rows.dtype
        if plan is None:
            self.rows = torch.empty_like(rows)
        else:
            self.rows = rows.new_empty(most, rows.shape[1], dtype=computed(rows))  # rows of one group
            self.sums = torch.zeros_like(rows, dtype=torch.promote_types(rows.dtype, torch.float32))

    def at(self, span: slice) -> Tensor:
        """The buffer to write a group's rows to."""
        return self.rows[span] if self.plan is None else self.rows[: span.stop - span.start]

    def add(self, span: slice) -> None:
        """Call it when a group's rows are written. A token's rows are added up in the order of the experts."""
        if self.plan is not None:
            self.sums.index_add_(0, self.plan.token[span], wide(self.at(span)))

    def done(self) -> Tensor:
        """The output, [R, D] or [T, D]."""
        return self.rows if self.plan is None else self.sums.to(self.dtype)


def products(a: Iterable[Tensor], b: Iterable[Tensor], out: Iterable[Tensor], add: bool = False) -> None:
    """Matrix product `mm` for each expert. A product over no rows is zeros."""
    for a_, b_, out_ in zip(a, b, out, strict=True):
        mm(a_, b_, out=out_, add=add)


def _most(all_groups: list[Group]) -> int:
    return max((group.rows.stop - group.rows.start for group in all_groups), default=0)


def _gatherer(rows: Tensor, most: int, plan: Plan | None) -> Callable[[Tensor, slice], Tensor]:
    """A function (rows, span) -> the rows of one group. With a plan, the next call overwrites the result."""
    dtype = computed(rows)
    if plan is None:
        return lambda rows, span: rows[span].to(dtype)
    room = rows.new_empty(most, rows.shape[1])

    def take(rows: Tensor, span: slice) -> Tensor:
        return torch.index_select(rows, 0, plan.token[span], out=room[: span.stop - span.start]).to(dtype)

    return take
