"""Perceptrons of all experts as one operator on Triton's kernels: from tokens to tokens, or from rows to rows."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ..dispatch.ops import encode_weight
from ..dispatch.plan import Plan

KERNELS = ("auto", "torch", "triton")


def fused(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    activation: str,
    plan: Plan | None = None,
) -> Tensor:
    """weight * (w_down act(w_up x)) of each row's expert, for rows sorted by expert.

    For the backward x, the rows' values before the activation and nothing else is kept; hidden rows are computed
    again there, from those values (SonicMoE, arXiv:2512.14080).

    Args:
        x: rows [R, D] -> weighted rows [R, D]. With a `plan` tokens [T, D] -> [T, D], each the sum of its rows, and
            no row of x or of the gradient is copied on the way. float32, bfloat16 or float16, as the w.
        weight: [R], the gate's weight of each row; with a `plan` [T, k].
        counts: int64 [L], rows of each expert; rows past their sum come back undefined.
        w_up, w_gate: [L, D, H]; w_gate for "swiglu" alone.
        w_down: [L, H, D].
    """
    weight = weight if plan is None else encode_weight(weight, plan)
    tensors = [t for t in (x, weight, w_up, w_gate, w_down) if t is not None]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    token, slot = (None, None) if plan is None else (plan.token, plan.slot)
    ends = counts.cumsum(0).to(torch.int32)
    w_up, w_down = w_up.contiguous(), w_down.contiguous()
    w_gate = None if w_gate is None else w_gate.contiguous()
    return _experts(x.contiguous(), weight, ends, token, slot, w_up, w_gate, w_down, activation, save)[0]


def check_kernel(kernel: str, x: Tensor) -> None:
    """Raise what is wrong with Triton for rows like `x`, and what to do."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f'kernel="{kernel}" takes float32, bfloat16 or float16; got {x.dtype}: set kernel="torch"')
    if x.is_meta or torch.compiler.is_compiling():
        return
    if importlib.util.find_spec("triton") is None:
        raise ModuleNotFoundError(f'kernel="{kernel}" needs Triton (pip install triton), or set kernel="torch"')
    if not x.is_cuda:
        from ..cuda.grouped import interpreted

        if not interpreted():
            raise ValueError(f'kernel="{kernel}" is for CUDA devices; the rows are on {x.device}: set kernel="torch"')


@torch.library.custom_op("turnout::experts", mutates_args=())
def _experts(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    token: Tensor | None,
    slot: Tensor | None,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from ..cuda import grouped

    hidden, up, gate = grouped.up(x, token, ends, weight, w_up, w_gate, activation, save)
    return _home(grouped.down([(hidden, w_down)], ends), token, slot), up, gate


@torch.library.custom_op("turnout::experts_backward", mutates_args=())
def _experts_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    token: Tensor | None,
    slot: Tensor | None,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    up: Tensor,
    gate: Tensor,
    activation: str,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of x, weight, w_down, w_up and, if gated, w_gate; empty where `wanted` (x; the w) says so."""
    from ..cuda import grouped

    to_x, to_weights = wanted
    hidden, *to_before, to_weight = grouped.hidden_backward(grad, token, ends, weight, w_down, up, gate, activation)
    before, ups = ([to_before[0]], [w_up]) if w_gate is None else (to_before, [w_up, w_gate])
    out = [x.new_empty(0), to_weight.to(weight.dtype), *(x.new_empty(0) for _ in (w_down, *ups))]
    if to_x:
        out[0] = _home(grouped.down(list(zip(before, ups, strict=True)), ends, transposed=True), token, slot)
    if to_weights:
        out[2:] = grouped.weight_backward(hidden, [grad], ends, b_token=token)
        out[3:] = grouped.weight_backward(x, before, ends, a_token=token)
    return out


def _home(rows: Tensor, token: Tensor | None, slot: Tensor | None) -> Tensor:
    return rows if token is None else torch.ops.turnout.decode(rows, token, slot)


@_experts.register_fake
def _(x, weight, ends, token, slot, w_up, w_gate, w_down, activation, save):
    rows, H = len(weight) if save else 0, w_up.shape[2]
    return torch.empty_like(x), x.new_empty(rows, H), x.new_empty(0 if w_gate is None else rows, H)


@_experts_backward.register_fake
def _(grad, x, weight, ends, token, slot, w_up, w_gate, w_down, up, gate, activation, wanted):
    weights = [w_down, w_up] if w_gate is None else [w_down, w_up, w_gate]
    of = [x, weight, *weights]
    asked = [wanted[0], True, *(wanted[1] for _ in weights)]
    return [t.new_empty(t.shape if yes else 0) for t, yes in zip(of, asked, strict=True)]


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.activation, _ = inputs
    _, up, gate = output
    ctx.mark_non_differentiable(up, gate)
    ctx.save_for_backward(*tensors, up, gate)


def _backward(ctx, grad: Tensor, *_):
    x, weight, ends, token, slot, w_up, w_gate, w_down, up, gate = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[5] or needs[6] or needs[7]]
    out = _experts_backward(
        grad.contiguous(), x, weight, ends, token, slot, w_up, w_gate, w_down, up, gate, ctx.activation, wanted
    )
    to_x, to_weight, to_down, to_up, *to_gate = out
    everything = to_x, to_weight, None, None, None, to_up, *(to_gate or [None]), to_down, None, None
    return tuple(g if need else None for g, need in zip(everything, needs, strict=True))


_experts.register_autograd(_backward, setup_context=_setup)
