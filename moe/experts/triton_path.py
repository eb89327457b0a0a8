"""Feed-forward experts as one operator, from tokens to tokens or from rows to rows: Triton kernels, or float8.

`_kit` is the one place that says which functions compute: `cuda/grouped.py` on given operands, the same on operands in
float8, or `float8.py`, which is plain PyTorch.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ...dispatch.plan import Plan
from ...dispatch.reorder import encode_weight
from ...dispatch.torch_internals import transformed
from .activation import ACTIVATIONS
from .blocked import Layer

KERNELS = ("auto", "torch", "triton")
PRECISIONS = (None, "fp8")


def fused(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    activation: str,
    ups: list[Layer],
    down: Layer,
    plan: Plan | None = None,
    how: str = "triton",
) -> Tensor:
    """Weighted output of each row's expert, weight * (W_down act(W_up x + b_up) + b_down), as one operator.

    Only x and the inputs of the activation are saved for backward, which computes hidden rows again (SonicMoE,
    arXiv:2512.14080).

    Args:
        x: rows sorted by expert [R, D], or tokens [T, D] with a `plan`. float32, bfloat16 or float16, as the layers.
        weight: router's weight of each row [R], or of each choice [T, k] with a `plan`.
        counts: number of rows of each expert, int64 [L].
        activation: name in `ACTIVATIONS`.
        ups: the up projection, or if gated up and gate projections. Each is a matrix [L, D, H] and a bias [L, H] or
            None.
        down: the down projection, a matrix [L, H, D] and a bias [L, D] or None.
        plan: plan of the tokens. Rows are then read from x without a copy. None, the default, for rows.
        how: ``"triton"``, the default, ``"triton, fp8"`` or ``"torch, fp8"``.

    Returns:
        Weighted rows [R, D], undefined past ``counts.sum()``. With a `plan`, the sum of each token's rows [T, D].
    """
    weight = weight if plan is None else encode_weight(weight, plan)
    (w_up, b_up), (w_gate, b_gate) = ups if len(ups) == 2 else (*ups, (None, None))
    layers = [None if t is None else t.contiguous() for t in (w_up, w_gate, down[0], b_up, b_gate, down[1])]
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, *layers))
    token, slot = (None, None) if plan is None else (plan.token, plan.slot)
    ends = counts.cumsum(0).to(torch.int32)
    return _experts(x.contiguous(), weight, ends, token, slot, *layers, activation, save, how)[0]


def check_triton(x: Tensor, activation: str) -> None:
    """Raise an error unless Triton kernels can compute rows like `x` with this activation."""
    if not ACTIVATIONS[activation].triton:
        raise ValueError(f'kernel="triton" has no activation {activation!r} (cuda/activations.py): set kernel="torch"')
    if transformed():
        raise NotImplementedError('kernel="triton" works in neither torch.func nor forward mode: set kernel="torch"')
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f'kernel="triton" takes float32, bfloat16 or float16; got {x.dtype}: set kernel="torch"')
    if torch.version.hip:
        raise NotImplementedError('kernel="triton" was never compiled for ROCm: set kernel="torch"')
    if x.is_meta or torch.compiler.is_compiling():
        return
    if importlib.util.find_spec("triton") is None:
        raise ModuleNotFoundError('kernel="triton" needs Triton (pip install triton), or set kernel="torch"')
    if not x.is_cuda:
        from ...cuda.grouped import interpreted

        if not interpreted():
            raise ValueError(f'kernel="triton" is for CUDA devices, but rows are on {x.device}: set kernel="torch"')


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
    b_up: Tensor | None,
    b_gate: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    save: bool,
    how: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kit = _kit(how)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        groups = kit.Groups(ends, len(weight))
        (a,) = kit.rows(x, ends=None if token is not None else ends)
        ups = [None if w is None else kit.columns(w) for w in (w_up, w_gate)]
        hidden, up, gate = kit.up(a, token, groups, weight, *ups, activation, save, b_up, b_gate)
        (a,) = kit.rows(hidden, ends=ends)
        rows = kit.down([(a, kit.columns(w_down))], groups, bias=b_down, weight=weight)
        return _unpermuted(rows, token, slot), up, gate


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
    b_down: Tensor | None,
    up: Tensor,
    gate: Tensor,
    activation: str,
    wanted: list[bool],
    how: str,
) -> list[Tensor]:
    """Gradients of x, weight, w_up, w_gate, w_down, b_up, b_gate, b_down.

    `wanted` says whether x, the matrices, and the biases need theirs. The others are empty.
    """
    to_x, to_weights, to_biases = wanted
    kit = _kit(how)
    with torch.cuda.device_of(x):
        groups, gates = kit.Groups(ends, len(weight)), None if w_gate is None else gate
        (a,), (matrix,) = kit.rows(grad, ends=None if token is not None else ends), kit.matrix_rows(w_down)
        hidden, before, to_weight = kit.hidden_backward(a, token, groups, weight, matrix, up, gates, activation)
        out = [x.new_empty(0) for _ in range(8)]
        if to_x:
            ups = kit.matrix_rows(*([w_up] if w_gate is None else [w_up, w_gate]))
            pairs = list(zip(kit.rows(*before, ends=ends), ups, strict=True))
            out[0] = _unpermuted(kit.down(pairs, groups, transposed=True), token, slot)
        if to_weights:
            out[2 : 2 + len(before)] = kit.weight_backward(x, before, groups, a_token=token)
            (out[4],) = kit.weight_backward(hidden, [grad], groups, b_token=token)
        if b_down is not None:
            if to_biases:
                out[5 : 5 + len(before)] = [kit.bias_backward(b, groups)[0] for b in before]
            out[7], more = kit.bias_backward(grad, groups, token, weight, b_down)
            to_weight += more
    out[1] = to_weight.to(weight.dtype)
    return out


def _kit(how: str) -> Any:
    """Functions that compute: products, and what makes their operands from rows and from matrices."""
    if how == "torch, fp8":
        from . import float8

        return float8
    from ...cuda import grouped

    if how == "triton":
        return SimpleNamespace(**vars(grouped), rows=_as_given, columns=lambda w: w, matrix_rows=_as_given)
    from ...cuda import scaling

    return SimpleNamespace(**vars(grouped), rows=scaling.rows, columns=scaling.columns, matrix_rows=scaling.matrix_rows)


def _as_given(*each: Tensor, ends: Tensor | None = None) -> tuple[Tensor, ...]:
    return each


def _unpermuted(rows: Tensor, token: Tensor | None, slot: Tensor | None) -> Tensor:
    return rows if token is None else torch.ops.turnout.decode(rows, token, slot)


@_experts.register_fake
def _(x, weight, ends, token, slot, w_up, w_gate, w_down, b_up, b_gate, b_down, activation, save, how):
    rows, H = len(weight) if save else 0, w_up.shape[2]
    return torch.empty_like(x), x.new_empty(rows, H), x.new_empty(0 if w_gate is None else rows, H)


@_experts_backward.register_fake
def _(grad, x, weight, ends, token, slot, w_up, w_gate, w_down, b_down, up, gate, activation, wanted, how):
    to_x, to_weights, to_biases = wanted
    biased, gated = b_down is not None, w_gate is not None
    asked = [to_x, True, to_weights, to_weights and gated, to_weights]
    asked += [to_biases and biased, to_biases and biased and gated, biased]
    of = [x, weight, w_up, w_up, w_down, w_up[:, 0], w_up[:, 0], w_down[:, 0]]
    return [t.new_empty(t.shape if yes else 0) for t, yes in zip(of, asked, strict=True)]


def _setup(ctx, inputs, output) -> None:
    *tensors, _b_up, _b_gate, b_down, ctx.activation, _, ctx.how = inputs
    _, up, gate = output
    ctx.mark_non_differentiable(up, gate)
    ctx.set_materialize_grads(False)  # or the backward would begin with zeros as large as up and gate
    ctx.save_for_backward(*tensors, b_down, up, gate)


def _backward(ctx, grad: Tensor, *_):
    if transformed(grad):
        raise NotImplementedError(_refused("batched gradients (is_grads_batched=True, or torch.func.vmap)", ctx.how))
    needs = ctx.needs_input_grad  # of x, weight, ends, token, slot, three matrices, three biases
    wanted = [needs[0], any(needs[5:8]), any(needs[8:11])]
    to_x, to_weight, *others = _experts_backward(grad.contiguous(), *ctx.saved_tensors, ctx.activation, wanted, ctx.how)
    everything = to_x, to_weight, None, None, None, *others, None, None, None
    return tuple(g if need else None for g, need in zip(everything, needs, strict=True))


def _keep_how(ctx, inputs, output) -> None:
    *_, ctx.how = inputs


def _backward_twice(ctx, *_):
    raise NotImplementedError(_refused("second derivatives (create_graph=True)", ctx.how))


def _refused(what: str, how: str) -> str:
    said, instead = ('precision="fp8"', "precision=None") if "fp8" in how else ('kernel="triton"', 'kernel="torch"')
    return f"{said} has no {what}: set {instead}"


_experts.register_autograd(_backward, setup_context=_setup)
_experts_backward.register_autograd(_backward_twice, setup_context=_keep_how)
