"""What stands between the experts' matrix products: activation, gating, and the gate's weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.ops import wide

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # as GPT-2 has it, and Megatron-LM
    "relu": F.relu,
    "swiglu": F.silu,  # of the gate; see `swiglu`
}
_CACHE = 1 << 18  # elements of a block: a few of them fit a core's cache, and the calls on each do not weigh


def swiglu(up: Tensor, gate: Tensor) -> Tensor:
    """silu(gate) * up (arXiv:2002.05202): [R, H], computed in float32 or wider and rounded once.

    Only the arguments are kept for the backward.
    """
    if torch.compiler.is_compiling():  # the compiler fuses this itself
        return (F.silu(wide(gate)) * wide(up)).to(up.dtype)
    return _SwiGLU.apply(up, gate)  # pyright: ignore[reportReturnType]


def weighted(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [R, D] times weight [R], which is float32 or wider; rounded once, to the dtype of rows."""
    if torch.compiler.is_compiling():
        return (rows * weight.unsqueeze(1)).to(rows.dtype)
    return _Weighted.apply(rows, weight)  # pyright: ignore[reportReturnType]


def weighted_before(experts: Callable[..., Tensor], rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Experts of rows [R, D] that are multiplied by their weight [R] on the way in, and not on the way out."""
    return experts(weighted(rows, weight), torch.ones_like(weight), counts)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, up, gate):
        ctx.save_for_backward(up, gate)
        out = torch.empty_like(up)
        for o, u, g in blocks(out, up, gate):
            torch.mul(F.silu(wide(g)), wide(u), out=o)
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        up, gate = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: as operators that autograd follows
            d, g = wide(grad), wide(gate)
            slope = g.sigmoid() * (1 + g * (1 - g.sigmoid()))
            return (F.silu(g) * d).to(up.dtype), (d * wide(up) * slope).to(gate.dtype)
        to_up, to_gate = torch.empty_like(up), torch.empty_like(gate)
        for to_u, to_g, d, u, g in blocks(to_up, to_gate, grad, up, gate):
            d, g = wide(d), wide(g)
            torch.mul(F.silu(g), d, out=to_u)
            to_g.copy_(torch.ops.aten.silu_backward(d * wide(u), g))
        return to_up, to_gate


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight):
        ctx.save_for_backward(rows, weight)
        out = torch.empty_like(rows)
        for o, r, w in blocks(out, rows, weight.unsqueeze(1)):
            torch.mul(r, w, out=o)
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            d = grad.to(weight.dtype)
            return (d * weight.unsqueeze(1)).to(rows.dtype), (d * rows).sum(1)
        to_rows, to_weight = torch.empty_like(rows), torch.empty_like(weight)
        for to_r, to_w, d, r, w in blocks(to_rows, to_weight, grad, rows, weight.unsqueeze(1)):
            torch.mul(d, w, out=to_r)
            to_w.copy_((d.to(w.dtype) * r).sum(1))
        return to_rows, to_weight


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of every tensor, in blocks that fit a CPU's cache; elsewhere all rows at once."""
    rows = tensors[0]
    step = max(1, _CACHE // max(1, rows.shape[1]) if rows.device.type == "cpu" else len(rows))
    return zip(*(t.split(step) for t in tensors), strict=True) if len(rows) else iter(())
