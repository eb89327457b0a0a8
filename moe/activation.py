"""The hidden layer of the experts: activation, gating and the gate's weight, in one pass over memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_aten = torch.ops.aten
# name -> (activation, its backward from the output's gradient and the input)
ACTIVATIONS = {
    "gelu": (F.gelu, _aten.gelu_backward),
    "relu": (F.relu, lambda grad, x: _aten.threshold_backward(grad, x, 0)),
    "swiglu": (F.silu, _aten.silu_backward),
}
_CACHE = 1 << 17  # elements of a block: small enough for its temporaries to stay in a core's cache


def weighted_activation(name: str, up: Tensor, gate: Tensor | None, weight: Tensor) -> Tensor:
    """weight * act(up), or weight * act(gate) * up where `gate` is given.

    Computed in float32 or wider and rounded once. Only the arguments are kept for the backward, which
    computes the rest again.

    Args:
        name: a key of ACTIVATIONS.
        up, gate: [R, H], one dtype; the result has it too.
        weight: [R], float32 or wider.
    """
    if torch.compiler.is_compiling():  # the compiler fuses this itself
        return _forward(name, up, gate, weight).to(up.dtype)
    return _WeightedActivation.apply(name, up, gate, weight)  # pyright: ignore[reportReturnType]


def _forward(name: str, up: Tensor, gate: Tensor | None, weight: Tensor) -> Tensor:
    act, _ = ACTIVATIONS[name]
    up, gate = up.to(weight.dtype), None if gate is None else gate.to(weight.dtype)
    hidden = act(up) if gate is None else act(gate) * up
    return hidden * weight.unsqueeze(1)


class _WeightedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, up, gate, weight):
        ctx.name = name
        ctx.save_for_backward(up, gate, weight)
        act, _ = ACTIVATIONS[name]
        out = torch.empty_like(up)
        for o, u, a, w in _blocks(out, up, gate, weight.unsqueeze(1)):
            u, a = _wide(u, w), _wide(a, w)
            torch.mul(act(u) if a is None else act(a).mul_(u), w, out=o)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        up, gate, weight = ctx.saved_tensors
        act, act_backward = ACTIVATIONS[ctx.name]
        to_up, to_weight = torch.empty_like(up), torch.empty_like(weight)
        to_gate = None if gate is None else torch.empty_like(gate)
        for to_u, to_a, to_w, g, u, a, w in _blocks(to_up, to_gate, to_weight, grad, up, gate, weight.unsqueeze(1)):
            g, u, a = _wide(g, w), _wide(u, w), _wide(a, w)
            if a is None:
                to_w.copy_(act(u).mul_(g).sum(1))
                torch.mul(act_backward(g, u), w, out=to_u)
            else:
                to_hidden = act(a).mul_(g)  # the gradient of u, unweighted
                torch.mul(to_hidden, w, out=to_u)
                to_w.copy_(to_hidden.mul_(u).sum(1))
                torch.mul(act_backward(g * u, a), w, out=to_a)
        return None, to_up, to_gate, to_weight


def _wide(x: Tensor | None, like: Tensor) -> Tensor | None:
    return None if x is None else x.to(like.dtype)


def _blocks(*tensors: Tensor | None) -> Iterator[tuple]:
    """The same rows of every tensor, in blocks whose temporaries fit a CPU's cache; elsewhere all rows at once."""
    rows = tensors[0]
    step = max(1, _CACHE // max(1, rows.shape[1]) if rows.device.type == "cpu" else len(rows))
    for first in range(0, len(rows), step):
        yield tuple(None if t is None else t[first : first + step] for t in tensors)
