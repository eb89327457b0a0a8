"""The router's linear map of bfloat16 tokens on a GPU: float32 results, without a float32 copy of the tokens.

The product of two bfloat16 numbers is exact in float32, and tensor cores add such products in float32. A float32
factor, such as the gradient of the logits, is the sum of three bfloat16 pieces, so its products are exact as well. The
map and its gradients have the precision of float32 matrix products, and read half the bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dispatch.torch_internals import transformed

PIECES = 3  # with 8 significant bits each; float32 has 24


@torch.library.custom_op("turnout::wide_linear", mutates_args=())
def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T with exact products, summed in float32.

    Args:
        x: tokens, bfloat16 [T, D].
        weight: bfloat16 or float32 [n, D].

    Returns:
        float32 [T, n], differentiable. Gradients have the dtypes of x and weight, and are rounded to them once.
    """
    with torch.autocast(x.device.type, enabled=False):
        if not _multiplies(x):
            return F.linear(x.float(), weight.float())
        if weight.dtype == x.dtype:
            return _mm(x, weight.T)
        return _mm(x, torch.cat(_pieces(weight)).T).unflatten(1, (PIECES, -1)).sum(1)


@torch.library.custom_op("turnout::wide_linear_backward", mutates_args=())
def _wide_linear_backward(grad: Tensor, x: Tensor, weight: Tensor, to_x: bool, to_weight: bool) -> list[Tensor]:
    """Gradients of x and weight. Those that are not wanted are empty."""
    with torch.autocast(x.device.type, enabled=False):
        if not _multiplies(x):
            plain = _plain(grad, x, weight, to_x, to_weight)
            return [x.new_empty(0) if g is None else g for g in plain]
        stacked, out = torch.cat(_pieces(grad), 1), [x.new_empty(0), weight.new_empty(0)]
        if to_x:  # leave out products of pieces below the precision of float32
            factors, n = _pieces(weight), grad.shape[1]
            left = [stacked[:, : (PIECES - j) * n] for j in range(len(factors))]
            right = [w for j, w in enumerate(factors) for _ in range(PIECES - j)]
            out[0] = (left[0] if len(left) == 1 else torch.cat(left, 1)) @ torch.cat(right)
        if to_weight:
            out[1] = _mm(stacked.T, x).unflatten(0, (PIECES, -1)).sum(0).to(weight.dtype)
        return out


def _plain(grad: Tensor, x: Tensor, weight: Tensor, to_x: bool, to_weight: bool) -> list[Tensor | None]:
    """Gradients of x and weight with differentiable operators, in float32 products."""
    by_x = (grad @ weight.float()).to(x.dtype) if to_x else None
    return [by_x, (grad.T @ x.float()).to(weight.dtype) if to_weight else None]


def _multiplies(x: Tensor) -> bool:
    """Whether the device of x has bfloat16 products with a float32 result, and there are any to compute."""
    if not x.is_cuda or torch.version.hip or not x.numel():
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32)


def _pieces(t: Tensor) -> list[Tensor]:
    """bfloat16 tensors that add up to t: t itself, or three for a float32 tensor."""
    if t.dtype == torch.bfloat16:
        return [t]
    pieces = [t.to(torch.bfloat16)]
    while len(pieces) < PIECES:
        t = t - pieces[-1]
        pieces.append(t.to(torch.bfloat16))
    return pieces


@wide_linear.register_fake
def _(x, weight):
    return x.new_empty(len(x), len(weight), dtype=torch.float32)


@_wide_linear_backward.register_fake
def _(grad, x, weight, to_x, to_weight):
    return [torch.empty_like(t) if wanted else t.new_empty(0) for t, wanted in ((x, to_x), (weight, to_weight))]


def _backward(ctx, grad: Tensor):
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    if torch.is_grad_enabled() or transformed(grad):  # create_graph=True, or batched gradients
        return tuple(_plain(grad, x, weight, *wanted))
    grads = _wide_linear_backward(grad, x, weight, *wanted)
    return tuple(g if want else None for g, want in zip(grads, wanted, strict=True))


wide_linear.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
