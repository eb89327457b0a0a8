"""encode: tokens -> rows.  decode: rows -> tokens, summed.  Each is the other's backward.

Both are custom operators (`torch.ops.turnout.*`), so that autograd, `torch.compile` and another
device's kernel see one node. Here they are written in plain PyTorch. Every output element is written
once and sums run over a token's k rows in their order, in float32 or wider: the result does not depend
on threads, and two runs agree to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Plan


def encode(x: Tensor, plan: Plan) -> Tensor:
    """Lay tokens out by expert: x [T, D] -> rows [R, D], rows[r] = x[plan.token[r]], empty rows zero.

    Same dtype as x; differentiable (the gradient of x is `decode` of the rows' gradient).

    >>> plan = Plan.of(torch.tensor([[1], [0]]), num_experts=2)
    >>> encode(torch.tensor([[1.0], [2.0]]), plan).tolist()
    [[2.0], [1.0]]
    """
    if x.ndim != 2 or x.shape[0] != plan.slot.shape[0]:
        raise ValueError(f"x must be [T, D] with the plan's T={plan.slot.shape[0]}; got {tuple(x.shape)}")
    return _encode(x, plan.token, plan.slot)


def decode(rows: Tensor, plan: Plan, weight: Tensor | None = None) -> Tensor:
    """Bring rows home: rows [R, D] -> y [T, D], y[t] = sum over j of rows[plan.slot[t, j]].

    Slots of -1 contribute nothing (they are skipped, not multiplied by zero: 0 * nan is nan). With
    `weight` [T, k] every row is weighted first; leave it out where the experts did that already.
    Same dtype as rows; accumulates in float32 or wider; differentiable in rows and weight.
    """
    if rows.ndim != 2 or rows.shape[0] != plan.token.shape[0]:
        raise ValueError(f"rows must be [R, D] with the plan's R={plan.token.shape[0]}; got {tuple(rows.shape)}")
    if weight is None:
        return _decode(rows, plan.token, plan.slot)
    weighted = rows * encode_weight(weight, plan).unsqueeze(1)
    return _decode(weighted, plan.token, plan.slot).to(rows.dtype)


def encode_weight(weight: Tensor, plan: Plan) -> Tensor:
    """The weight of each row: weight [T, k] -> [R], 0 in empty rows. Differentiable."""
    rows = plan.token.shape[0]
    slot = torch.where(plan.slot < 0, rows, plan.slot).flatten()  # the dropped land in a row that is cut off
    return weight.new_zeros(rows + 1).scatter(0, slot, weight.flatten())[:rows]


def permute(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """rows [R, ...] in another order: out[r] = rows[order[r]], with inverse[order[r]] = r.

    A plan with k = 1: its backward is a gather too, where plain indexing would add atomically.
    """
    if rows.ndim == 1:
        return permute(rows.unsqueeze(1), order, inverse).squeeze(1)
    return _encode(rows, order, inverse.unsqueeze(1))


@torch.library.custom_op("turnout::encode", mutates_args=())
def _encode(x: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    return _gather(x, token)


@torch.library.custom_op("turnout::decode", mutates_args=())
def _decode(rows: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    if slot.shape[1] == 1:
        return _gather(rows, slot.squeeze(1))
    if rows.device.type != "cpu" or not len(rows):
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return sum((_gather(wide, home) for home in slot.unbind(1)), wide.new_zeros(slot.shape[0], 1)).to(rows.dtype)
    kept = slot >= 0  # on a CPU in one pass: torch adds up the rows of a bag in order, in float32 or wider
    number = kept.sum(1)
    return torch.embedding_bag(rows, slot[kept], number.cumsum(0) - number, mode=0)[0]


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x[index], zeros where the index is -1."""
    none = index < 0
    if not len(x):
        return x.new_zeros(len(index), x.shape[1])
    rows = x.index_select(0, index.clamp(min=0))
    if none.device.type != "cpu" or bool(none.any()):  # where asking costs nothing, spare the pass over the rows
        rows.masked_fill_(none.unsqueeze(1), 0)
    return rows


@_encode.register_fake
def _(x: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    return x.new_empty(token.shape[0], x.shape[1])


@_decode.register_fake
def _(rows: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    return rows.new_empty(slot.shape[0], rows.shape[1])


def _keep_indices(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _encode_backward(ctx, grad: Tensor):
    return _decode(grad.contiguous(), *ctx.saved_tensors), None, None


def _decode_backward(ctx, grad: Tensor):
    return _encode(grad.contiguous(), *ctx.saved_tensors), None, None


_encode.register_autograd(_encode_backward, setup_context=_keep_indices)
_decode.register_autograd(_decode_backward, setup_context=_keep_indices)
