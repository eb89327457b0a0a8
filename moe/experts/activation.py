"""Activations of experts (GELU, SwiGLU ...) in one table, and multiplication by the router's weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dispatch.reorder import wide
from ...dispatch.torch_internals import transformed

_CACHE = 1 << 17  # elements of a block: a few blocks in float32 fit a cache of 2 MiB, and calls cost little
_WIDE = torch.float32, torch.float64  # others would be rounded at every operator
_aten = torch.ops.aten


class Pointwise(NamedTuple):
    """An elementwise function f and its backward.

    Attributes:
        value: function x -> f(x) that returns a new tensor, made of differentiable PyTorch operators.
        backward: function (grad, x) -> grad * f'(x).
        out: both, with a last argument ``out=`` to which they write. None, the default, if there are none.
    """

    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    out: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None

    def write(self, out: Tensor, x: Tensor) -> Tensor:
        """Write f(x) to `out`, which may be x."""
        return out.copy_(self.value(x)) if self.out is None else self.out[0](x, out=out)

    def write_backward(self, out: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        """Write grad * f'(x) to `out`, which may be grad."""
        return out.copy_(self.backward(grad, x)) if self.out is None else self.out[1](grad, x, out=out)


def _clamped_silu(x: Tensor) -> Tensor:
    x = x.clamp(max=7.0)
    return x * (1.702 * x).sigmoid()


def _clamped_silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    sigmoid = (1.702 * x).sigmoid()
    return torch.where(x <= 7.0, grad * sigmoid * (1 + 1.702 * x * (1 - sigmoid)), 0)


def _gelu(approximate: str) -> Pointwise:
    value, backward, *out = (
        partial(function, approximate=approximate)
        for function in (F.gelu, _aten.gelu_backward, _aten.gelu.out, _backward_out(_aten.gelu_backward.grad_input))
    )
    return Pointwise(value, backward, (out[0], out[1]))


def _backward_out(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda grad, x, out, **options: operator(grad, x, grad_input=out, **options)


_GELU, _GELU_TANH = _gelu("none"), _gelu("tanh")
_RELU = Pointwise(F.relu, lambda grad, x: _aten.threshold_backward(grad, x, 0))
_RELU2 = Pointwise(lambda x: F.relu(x).square(), lambda grad, x: grad * F.relu(x).mul_(2))
_SILU = Pointwise(F.silu, _aten.silu_backward, (_aten.silu.out, _backward_out(_aten.silu_backward.grad_input)))
_CLAMPED_SILU = Pointwise(_clamped_silu, _clamped_silu_backward)
_CLAMPED_PLUS_1 = Pointwise(lambda x: x.clamp(-7.0, 7.0) + 1, lambda grad, x: torch.where(x.abs() <= 7.0, grad, 0))


@dataclass(frozen=True)
class Activation:
    """Activation between an expert's matrix products: act(up), or if gated act(gate) * up.

    Attributes:
        act: function of the up projection, or if gated of the gate projection.
        gated: whether there is a gate projection; False by default.
        on_up: if gated, a function that is applied to the up projection first. None, the default, applies none.
        triton: whether `cuda/activations.py` has a function of this name, which ``kernel="triton"`` needs.

    >>> ACTIVATIONS["reglu"](torch.tensor([3.0, 3.0]), torch.tensor([-1.0, 2.0])).tolist()  # up, gate
    [0.0, 6.0]
    """

    act: Pointwise
    gated: bool = False
    on_up: Pointwise | None = None
    triton: bool = False

    def __call__(self, up: Tensor, gate: Tensor | None = None) -> Tensor:
        """The hidden rows in the dtype of `up`, from the projections, with differentiable PyTorch operators."""
        return self.act.value(up) if gate is None else self.act.value(gate) * self.factor(up)

    def factor(self, up: Tensor) -> Tensor:
        """The factor of act(gate): the up projection, after `on_up` if there is one."""
        return up if self.on_up is None else self.on_up.value(up)

    def write(self, out: Tensor, up: Tensor, gate: Tensor | None = None) -> Tensor:
        """The hidden rows, from float32 or float64: written to `out` if that has the dtype, else over the first."""
        first = up if gate is None else gate
        hidden = self.act.write(out if out.dtype == first.dtype else first, first)
        return hidden if gate is None else hidden.mul_(self.factor(up))

    def backward(self, grad: Tensor, up: Tensor, gate: Tensor | None = None) -> tuple[Tensor, ...]:
        """The hidden rows, computed again, and the gradients of up and gate from the gradient of hidden rows."""
        if gate is None:
            return self.act.value(up), self.act.backward(grad, up)
        act, factor = self.act.value(gate), self.factor(up)
        to_up, to_gate = grad * act, grad * factor
        to_up = to_up if self.on_up is None else self.on_up.backward(to_up, up)
        return act.mul_(factor), to_up, self.act.write_backward(to_gate, to_gate, gate)


ACTIVATIONS = {
    "gelu": Activation(_GELU, triton=True),
    "gelu_tanh": Activation(_GELU_TANH, triton=True),  # of GPT-2 and Megatron-LM
    "relu": Activation(_RELU, triton=True),
    "relu2": Activation(_RELU2, triton=True),  # squared ReLU (Primer, arXiv:2109.08668), used in Nemotron
    "swiglu": Activation(_SILU, gated=True, triton=True),  # this and the next three: arXiv:2002.05202
    "geglu": Activation(_GELU, gated=True, triton=True),
    "geglu_tanh": Activation(_GELU_TANH, gated=True, triton=True),
    "reglu": Activation(_RELU, gated=True, triton=True),
    # gpt-oss: both projections are clamped to 7, and 1 is added to up (arXiv:2508.10925)
    "clamped_swiglu": Activation(_CLAMPED_SILU, gated=True, on_up=_CLAMPED_PLUS_1, triton=True),
}


def activated(kind: Activation, up: Tensor, gate: Tensor | None = None) -> Tensor:
    """Apply an activation to up and gate [R, H] -> [R, H], in float32 or float64 with one rounding at the end.

    Only the arguments are saved for backward.
    """
    if gate is None:  # PyTorch's own functions compute in float32 inside, and save one tensor
        return kind(up)
    if torch.compiler.is_compiling() or transformed():  # the compiler fuses these operators itself
        return kind(wide(up), wide(gate)).to(up.dtype)
    return _Gated.apply(kind, up, gate)  # pyright: ignore[reportReturnType]


def weighted(rows: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows [R, D] by the router's weight [R], float32 or float64. The product is rounded once, as `rows`."""
    if torch.compiler.is_compiling() or transformed():
        return (rows * weight.unsqueeze(1)).to(rows.dtype)
    return _Weighted.apply(rows, weight)  # pyright: ignore[reportReturnType]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kind, up, gate):
        ctx.kind = kind
        ctx.save_for_backward(up, gate)
        out, direct = torch.empty_like(up), up.dtype in _WIDE
        for o, u, g in blocks(out, up, gate):
            if direct:
                kind.write(o, u, g)
            else:
                o.copy_(kind.write(o, wide(u), wide(g)))
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        kind, (up, gate) = ctx.kind, ctx.saved_tensors
        if torch.is_grad_enabled() or transformed(grad):
            plain = lambda up, gate: kind(wide(up), wide(gate)).to(up.dtype)  # noqa: E731
            return None, *differentiated(plain, [up, gate], ctx.needs_input_grad[1:], grad)
        to_up, to_gate, direct = torch.empty_like(up), torch.empty_like(gate), up.dtype in _WIDE
        for to_u, to_g, d, u, g in blocks(to_up, to_gate, grad, up, gate):
            d, u, g = wide(d), wide(u), wide(g)  # copies in half precision, over which gradients are written
            factor = kind.factor(u)
            by_gate = torch.mul(d, factor, out=to_g if direct else factor)
            kind.act.write_backward(by_gate, by_gate, g)
            by_up = kind.act.write(to_u if direct else g, g).mul_(d)
            if kind.on_up is not None:
                by_up = kind.on_up.backward(by_up, u)
            for to, by in ((to_u, by_up), (to_g, by_gate)):
                if to is not by:
                    to.copy_(by)
        return None, to_up, to_gate


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
        if torch.is_grad_enabled() or transformed(grad):
            d = grad.to(weight.dtype)
            return (d * weight.unsqueeze(1)).to(rows.dtype), (d * rows).sum(1)
        to_rows, to_weight = torch.empty_like(rows), torch.empty_like(weight)
        for to_r, to_w, d, r, w in blocks(to_rows, to_weight, grad, rows, weight.unsqueeze(1)):
            torch.mul(d, w, out=to_r)
            to_w.copy_((d.to(w.dtype) * r).sum(1))
        return to_rows, to_weight


def differentiated(
    function: Callable[..., Tensor], given: list[Tensor | None], needs: tuple[bool, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of the tensors in `given` that need one, computed with differentiable operators; None for others.

    The backward of an `autograd.Function` uses it when it is itself differentiated (create_graph=True) or batched.
    """
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views cut the graph between inputs: one may be computed from another, such as a weight from the tokens.
        views = [None if t is None else t.view_as(t) for t in given]
        wanted = [t for t, need in zip(views, needs, strict=True) if t is not None and need]
        grads = iter(torch.autograd.grad(function(*views), wanted, grad, create_graph=create))
    return tuple(next(grads) if t is not None and need else None for t, need in zip(given, needs, strict=True))


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all tensors, in blocks that fit a CPU's cache. On other devices, all rows are one block."""
    rows = tensors[0]
    step = max(1, _CACHE // max(1, rows.shape[1]) if rows.device.type == "cpu" else len(rows))
    return zip(*(t.split(step) for t in tensors), strict=True) if len(rows) else iter(())
