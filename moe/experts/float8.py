"""Grouped products in float8 (e4m3) with a scale for each row and each column, in plain PyTorch.

A row is divided by a power of two, so that its largest magnitude is above 224 and at most 448, the largest of e4m3, and
rounded. Nothing saturates. The scale of a row with infinity or NaN is NaN. On sm_90 torch's `_scaled_grouped_mm`
multiplies, elsewhere float32 products of the rounded numbers. Functions have the names and arguments of
`cuda/grouped.py` and `cuda/scaling.py`, and return the same numbers but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cuda.scaled import Scaled
from ...dispatch.reorder import wide
from ...dispatch.torch_internals import scaled_grouped_mm, transformed
from .activation import ACTIVATIONS
from .grouped_mm import fits_torch, grouped_bias, spans

FLOAT8 = torch.float8_e4m3fn


class Groups:
    """Rows sorted by expert: `ends` int32 [L], and their number R. Others than those before ends[-1] are padding."""

    def __init__(self, ends: Tensor, rows: int) -> None:
        self.ends, self.rows = ends, rows


def torch_multiplies(device: torch.device, dtype: torch.dtype, *sizes: int) -> bool:
    """Whether torch has these products: on sm_90, with results in bfloat16, and sizes that are multiples of 16."""
    fits = dtype == torch.bfloat16 and not any(size % 16 for size in sizes)
    return fits and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def check_float8(x: Tensor, kernel: str, *sizes: int) -> None:
    """Raise an error unless experts of these sizes D and H can multiply rows like `x` in float8 with this kernel."""
    said = 'precision="fp8"'
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{said} takes float32, bfloat16 or float16; got {x.dtype}: set precision=None")
    if transformed():
        raise NotImplementedError(f"{said} works in neither torch.func nor forward mode: set precision=None")
    if torch.version.hip:
        raise NotImplementedError(f"{said} was never compiled for ROCm, whose float8 is another: set precision=None")
    if not x.is_cuda:
        return
    if torch.cuda.get_device_capability(x.device) < (8, 9):
        raise ValueError(f"{said} needs a GPU with products in float8, sm_89 or later: set precision=None")
    if kernel == "torch" and not torch_multiplies(x.device, x.dtype, *sizes):
        raise ValueError(
            f'{said} with kernel="torch" needs sm_90, bfloat16 and sizes that are multiples of 16; got {x.dtype} and '
            f'{", ".join(map(str, sizes))} on {torch.cuda.get_device_name(x.device)}: set kernel="triton"'
        )


def scales(largest: Tensor) -> tuple[Tensor, Tensor]:
    """Power of two for each largest magnitude (float32), and its inverse, which makes it at most 448.

    >>> scales(torch.tensor([448.0, 449.0, 1.0]))[0].tolist()
    [1.0, 2.0, 0.00390625]
    """
    bits = largest.view(torch.int32) & 0x7FFFFFFF  # NaN may have a sign
    exponent = ((bits + 0x1FFFFF) >> 23).clamp(min=9) - 8  # the carry tells mantissas above 1.75 = 448 / 256
    scale = (exponent << 23).view(torch.float32).masked_fill(bits >= 0x7F800000, torch.nan)
    return scale, ((254 - exponent) << 23).view(torch.float32)


def rows(*each: Tensor, ends: Tensor | None = None) -> list[Scaled]:
    """One or two tensors [..., R, K] of like rows, with one scale [..., R] for both."""
    largest = [t.abs().amax(-1).float() for t in each]
    scale, inverse = scales(largest[0] if len(largest) == 1 else torch.maximum(*largest))
    inverse = inverse.unsqueeze(-1)
    return [Scaled((t.float() * inverse).to(FLOAT8), scale, t.dtype) for t in each]


def columns(matrix: Tensor) -> Scaled:
    """Matrices [L, K, N] by columns: values [L, N, K], scale [L, N]."""
    return rows(matrix.mT.contiguous())[0]


matrix_rows = rows


def up(
    x: Scaled,
    token: Tensor | None,
    groups: Groups,
    weight: Tensor,
    w_up: Scaled,
    w_gate: Scaled | None,
    activation: str,
    save: bool,
    b_up: Tensor | None = None,
    b_gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden rows [R, H], then up and gate before the activation: see `grouped.up`."""
    x = _gathered(x, token)
    before = [
        _biased(_product(x, w, groups), b, groups).to(x.dtype)
        for w, b in ((w_up, b_up), (w_gate, b_gate))
        if w is not None
    ]
    hidden = (ACTIVATIONS[activation](*map(wide, before)) * weight.unsqueeze(1)).to(x.dtype)
    saved = before if save else []
    # an operator returns no tensor twice
    saved += [hidden.new_empty(0, hidden.shape[1]) for _ in range(2 - len(saved))]
    return hidden, saved[0], saved[1]


def down(
    pairs: Sequence[tuple[Scaled, Scaled]],
    groups: Groups,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    **_: bool,
) -> Tensor:
    """Sum over pairs (a, b) of the product of a [R, K] with b, [R, N]: see `grouped.down`."""
    total = _product(*pairs[0], groups)
    for pair in pairs[1:]:
        total = total + _product(*pair, groups)
    return _biased(total, bias, groups, weight).to(pairs[0][0].dtype)


def hidden_backward(
    grad: Scaled,
    token: Tensor | None,
    groups: Groups,
    weight: Tensor,
    w_down: Scaled,
    up: Tensor,
    gate: Tensor | None,
    activation: str,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Hidden rows, gradients of up and gate, and of weight: see `grouped.hidden_backward`."""
    d, scale = wide(_product(_gathered(grad, token), w_down, groups)), weight.unsqueeze(1)
    hidden, *slopes = ACTIVATIONS[activation].backward(d, *(wide(t) for t in (up, gate) if t is not None))
    to_weight = (d * hidden).sum(1)
    return (hidden * scale).to(up.dtype), [(t * scale).to(up.dtype) for t in slopes], to_weight


def weight_backward(
    a: Tensor, others: list[Tensor], groups: Groups, a_token: Tensor | None = None, b_token: Tensor | None = None
) -> list[Tensor]:
    """a^T b over each expert's rows [L, K, N], in the dtype of a, not in float8: see `grouped.weight_backward`."""
    a, *others = _taken(a, a_token), *(_taken(b, b_token) for b in others)
    if a.is_cuda and fits_torch(a, a.unsqueeze(0)) and all(fits_torch(b, b.unsqueeze(0)) for b in others):
        return [F.grouped_mm(a.mT, b, offs=groups.ends) for b in others]
    return [torch.ops.turnout.grouped_mm_weight(a, b, groups.ends) for b in others]


def bias_backward(
    a: Tensor, groups: Groups, token: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of bias and weight in the summand weight * bias: see `grouped.bias_backward`."""
    rows, to_weight = wide(_taken(a, token)), torch.zeros(groups.rows, device=a.device)
    if weight is not None and bias is not None:
        to_weight = (rows * grouped_bias(wide(bias), groups.ends, groups.rows)).sum(1)
        rows = rows * weight.unsqueeze(1)
    return torch.ops.turnout.grouped_sum(rows, groups.ends).to(a.dtype), to_weight


def _product(a: Scaled, b: Scaled, groups: Groups) -> Tensor:
    """a [R, K] times b, values [L, N, K] -> [R, N], float32; bfloat16 by torch's operator."""
    if not torch_multiplies(a.values.device, a.dtype, *b.values.shape[1:]):
        return _emulated(a, b, groups)
    if not len(a.values):
        return a.values.new_empty(0, b.values.shape[1], dtype=torch.bfloat16)
    return scaled_grouped_mm(a.values, b.values.mT, a.scale, b.scale, groups.ends)


def _emulated(a: Scaled, b: Scaled, groups: Groups) -> Tensor:
    y = a.scale.new_zeros(len(a.values), b.values.shape[1])
    for e, span in spans(groups.ends):
        torch.mm(a.values[span].float(), b.values[e].float().T, out=y[span])
        y[span].mul_(a.scale[span].unsqueeze(1)).mul_(b.scale[e])
    return y


def _biased(y: Tensor, bias: Tensor | None, groups: Groups, weight: Tensor | None = None) -> Tensor:
    if bias is None:
        return y
    each = grouped_bias(wide(bias), groups.ends, groups.rows)
    return y + (each if weight is None else each * weight.unsqueeze(1))


def _gathered(x: Scaled, token: Tensor | None) -> Scaled:
    """Rows x[token], zeros where it is -1: a row of zeros is put behind the last."""
    if token is None:
        return x
    values = F.pad(x.values.view(torch.uint8), (0, 0, 0, 1))[token].view(FLOAT8)
    return Scaled(values, F.pad(x.scale, (0, 1))[token], x.dtype)


def _taken(x: Tensor, token: Tensor | None) -> Tensor:
    return x if token is None else F.pad(x, (0, 0, 0, 1))[token]
