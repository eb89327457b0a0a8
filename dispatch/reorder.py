"""encode: tokens -> rows.  decode: rows -> tokens, summed.  Each is the other's backward.

Both are custom operators (`torch.ops.turnout.*`), so that autograd, `torch.compile` and another
device's kernel see one node. Where `kernels` can serve the device and dtype they run its kernels, elsewhere
plain PyTorch. Every output element is written once and sums run over a token's k rows in their order, in
float32 or wider: the result does not depend on threads, and two runs agree to the bit.

Kernels and plain PyTorch on a CPU round alike (weighted, a product together with the sum it is added to), with one
exception. `decode` without weights of bfloat16 rows, k > 1, on an x86 CPU: a sum halfway between two bfloat16 numbers
goes to the larger in magnitude, not to the even one (FBGEMM, torch 2.13). Of random rows that is one element in ten for
k = 2, in twenty for k = 8; the mean grows by 6e-4 and 3e-4 of itself. What rounds to even there takes twice as long or
more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cuda.launch import backends
from . import kernels
from .plan import Plan
from .torch_internals import embedding_bag_weight_backward, transformed


def encode(x: Tensor, plan: Plan) -> Tensor:
    """Lay tokens out by expert: x [T, D] -> rows [R, D], rows[r] = x[plan.token[r]], empty rows zero.

    Same dtype as x; differentiable (the gradient of x is `decode` of the rows' gradient).

    >>> plan = Plan.of(torch.tensor([[1], [0]]), num_experts=2)
    >>> encode(torch.tensor([[1.0], [2.0]]), plan).tolist()
    [[2.0], [1.0]]
    """
    if x.ndim != 2 or x.shape[0] != plan.slot.shape[0]:
        raise ValueError(f"x must be [T, D] with the plan's T={plan.slot.shape[0]}; got {tuple(x.shape)}")
    return _gather(x, plan.token) if transformed() else _encode(x, plan.token, plan.slot)


def decode(rows: Tensor, plan: Plan, weight: Tensor | None = None) -> Tensor:
    """Bring rows home: rows [R, D] -> y [T, D], y[t] = sum over j of rows[plan.slot[t, j]].

    Slots of -1 contribute nothing (they are skipped, not multiplied by zero: 0 * nan is nan). With
    `weight` [T, k] every row is weighted first; leave it out where the experts did that already.
    Same dtype as rows; accumulates in float32 or wider; differentiable in rows and weight.
    """
    if rows.ndim != 2 or rows.shape[0] != plan.token.shape[0]:
        raise ValueError(f"rows must be [R, D] with the plan's R={plan.token.shape[0]}; got {tuple(rows.shape)}")
    if transformed():
        return _sum_of_terms(rows, plan.slot, None if weight is None else wide(weight))
    if weight is None:
        return _decode(rows, plan.token, plan.slot)
    return _decode_weighted(rows, weight, plan.token, plan.slot)


def encode_weight(weight: Tensor, plan: Plan) -> Tensor:
    """The weight of each row: weight [T, k] -> [R], 0 in empty rows. Differentiable."""
    return _row_weight(weight, plan.slot, plan.token.shape[0])


def permute(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """rows [R, ...] in another order: out[r] = rows[order[r]], with inverse[order[r]] = r.

    A plan with k = 1: its backward is a gather too, where plain indexing would add atomically.
    """
    if rows.ndim == 1:
        return permute(rows.unsqueeze(1), order, inverse).squeeze(1)
    return _gather(rows, order) if transformed() else _encode(rows, order, inverse.unsqueeze(1))


def wide(x: Tensor) -> Tensor:
    """x in float32, or float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("turnout::encode", mutates_args=())
def _encode(x: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    return kernels.encode(x, token, slot) if x.device.type in backends and kernels.moves(x) else _gather(x, token)


@torch.library.custom_op("turnout::decode", mutates_args=())
def _decode(rows: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    return kernels.decode(rows, slot) if rows.device.type in backends and kernels.sums(rows) else _sum(rows, slot)


@torch.library.custom_op("turnout::decode_weighted", mutates_args=())
def _decode_weighted(rows: Tensor, weight: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    if rows.device.type in backends and kernels.sums(rows):
        return kernels.decode(rows, slot, weight)
    return _sum(rows, slot, wide(weight))


@torch.library.custom_op("turnout::decode_weighted_backward", mutates_args=())
def _decode_weighted_backward(
    grad: Tensor, rows: Tensor, weight: Tensor, token: Tensor, slot: Tensor
) -> tuple[Tensor, Tensor]:
    """grad_rows[slot[t, j]] = weight[t, j] grad[t] and grad_weight[t, j] = <rows[slot[t, j]], grad[t]>."""
    if rows.device.type in backends and kernels.sums(rows):
        return kernels.decode_backward(grad, rows, weight, token, slot)
    to_rows = _gather(grad, token)
    to_weight = _dots(rows, grad, to_rows, slot)
    return to_rows.mul_(_row_weight(wide(weight), slot, len(rows)).unsqueeze(1)), to_weight.to(weight.dtype)


def _sum(rows: Tensor, slot: Tensor, weight: Tensor | None = None) -> Tensor:
    """y[t] = sum over j of rows[slot[t, j]], times weight[t, j] if there are weights."""
    if slot.shape[1] == 1 and weight is None:
        return _gather(rows, slot.squeeze(1))
    if rows.device.type != "cpu" or not len(rows):
        return _sum_of_terms(rows, slot, weight)
    kept = slot >= 0  # on a CPU in one pass: torch adds up the rows of a bag in order, in float32 or wider
    if bool(kept.all()):
        home, start = slot.flatten(), torch.arange(0, slot.numel(), slot.shape[1])
    else:
        number = kept.sum(1)
        home, start = slot[kept], number.cumsum(0) - number
    if weight is None:
        return torch.embedding_bag(rows, home, start, mode=0)[0]
    terms = wide(rows)
    each = weight[kept].to(terms.dtype)
    return torch.embedding_bag(terms, home, start, mode=0, per_sample_weights=each)[0].to(rows.dtype)


def _sum_of_terms(rows: Tensor, slot: Tensor, weight: Tensor | None) -> Tensor:
    """`_sum`, choice by choice, every operator differentiable."""
    terms = wide(rows) if weight is None else rows * _row_weight(weight, slot, len(rows)).unsqueeze(1)
    return sum((_gather(terms, home) for home in slot.unbind(1)), terms.new_zeros(slot.shape[0], 1)).to(rows.dtype)


def _dots(rows: Tensor, grad: Tensor, grad_rows: Tensor, slot: Tensor) -> Tensor:
    """<rows[slot[t, j]], grad[t]> [T, k], 0 where dropped; `grad_rows` is grad laid out as rows."""
    if rows.device.type != "cpu" or not len(rows):
        return _gather((wide(grad_rows) * rows).sum(1, keepdim=True), slot.flatten()).view_as(slot)
    home, token = slot.flatten(), torch.arange(slot.numel()) // slot.shape[1]  # without a pass of products; skips -1
    return embedding_bag_weight_backward(wide(grad), wide(rows), home, token, token, mode=0).view_as(slot)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x[index], zeros where the index is -1."""
    none = index < 0
    if not len(x):
        return x.new_zeros(len(index), x.shape[1])
    rows = x.index_select(0, index.clamp(min=0))
    if none.device.type != "cpu" or bool(none.any()):  # where asking costs nothing, spare the pass over the rows
        rows.masked_fill_(none.unsqueeze(1), 0)
    return rows


def _row_weight(weight: Tensor, slot: Tensor, rows: int) -> Tensor:
    """The weight of each of `rows` rows, 0 in those that no slot names."""
    home = torch.where(slot < 0, rows, slot).flatten()  # the dropped land in a row that is cut off
    return weight.new_zeros(rows + 1).scatter(0, home, weight.flatten())[:rows]


@_encode.register_fake
def _(x: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    return x.new_empty(token.shape[0], x.shape[1])


@_decode.register_fake
def _(rows: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    return rows.new_empty(slot.shape[0], rows.shape[1])


@_decode_weighted.register_fake
def _(rows: Tensor, weight: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    return rows.new_empty(slot.shape[0], rows.shape[1])


@_decode_weighted_backward.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor, token: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape)


def _keep_indices(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _keep_all(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _encode_backward(ctx, grad: Tensor):
    return _decode(grad.contiguous(), *ctx.saved_tensors), None, None


def _decode_backward(ctx, grad: Tensor):
    return _encode(grad.contiguous(), *ctx.saved_tensors), None, None


def _weighted_backward(ctx, grad: Tensor):
    return *_decode_weighted_backward(grad.contiguous(), *ctx.saved_tensors), None, None


def _weighted_twice_backward(ctx, to_rows: Tensor, to_weight: Tensor):
    """Both gradients are bilinear, so that theirs are the same two operators again."""
    grad, rows, weight, *indices = ctx.saved_tensors
    to_grad = _decode_weighted(to_rows, weight, *indices) + _decode_weighted(rows, to_weight, *indices)
    return to_grad, *_decode_weighted_backward(grad, to_rows, to_weight, *indices), None, None


_encode.register_autograd(_encode_backward, setup_context=_keep_indices)
_decode.register_autograd(_decode_backward, setup_context=_keep_indices)
_decode_weighted.register_autograd(_weighted_backward, setup_context=_keep_all)
_decode_weighted_backward.register_autograd(_weighted_twice_backward, setup_context=_keep_all)
