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
_CACHE = 1 << 18  # elements of a block: small enough for its temporaries to stay in a core's cache


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
        out = torch.empty_like(up)
        for block in _blocks(up):
            out[block] = _forward(name, up[block], None if gate is None else gate[block], weight[block])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        up, gate, weight = ctx.saved_tensors
        act, act_backward = ACTIVATIONS[ctx.name]
        to_up, to_weight = torch.empty_like(up), torch.empty_like(weight)
        to_gate = None if gate is None else torch.empty_like(gate)
        for block in _blocks(up):
            g, u, w = grad[block].to(weight.dtype), up[block].to(weight.dtype), weight[block].unsqueeze(1)
            a = u if gate is None else gate[block].to(weight.dtype)  # what the activation was applied to
            acted = act(a)
            gw = g * w
            if to_gate is None:
                to_weight[block] = torch.linalg.vecdot(g, acted)
                to_up[block] = act_backward(gw, a)
            else:
                to_weight[block] = torch.linalg.vecdot(g, acted * u)
                to_up[block] = gw * acted
                to_gate[block] = act_backward(gw * u, a)
        return None, to_up, to_gate, to_weight


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Blocks of rows [R, H] whose temporaries fit a CPU's cache; elsewhere all rows at once."""
    step = max(1, _CACHE // max(1, rows.shape[1])) if rows.device.type == "cpu" else max(1, len(rows))
    return (slice(first, first + step) for first in range(0, len(rows), step))
