"""What stands between the experts' matrix products: activation, gating, and the gate's weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "swiglu": F.silu}  # swiglu: of the gate; see `swiglu`


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


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, up, gate):
        ctx.save_for_backward(up, gate)
        return F.silu(wide(gate)).mul_(wide(up)).to(up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        up, gate = ctx.saved_tensors
        d, g = wide(grad), wide(gate)
        return F.silu(g).mul_(d).to(up.dtype), torch.ops.aten.silu_backward(d * wide(up), g).to(gate.dtype)


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight):
        ctx.save_for_backward(rows, weight)
        return (rows * weight.unsqueeze(1)).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weight = ctx.saved_tensors
        return (grad * weight.unsqueeze(1)).to(rows.dtype), (grad.to(weight.dtype) * rows).sum(1)


def wide(x: Tensor) -> Tensor:
    """x in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
