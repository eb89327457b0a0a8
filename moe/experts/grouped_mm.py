"""Grouped GEMM: each expert's matrix times its rows, which are sorted by expert, and grouped biases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dispatch.reorder import wide
from ...dispatch.torch_internals import has_half_products, has_slow_half_products, transformed

# From this size on, float32 repays the conversions on a CPU with slow products in half precision. Forward and backward
# of 16 experts [512, 1024] take 1.53 times as long as in bfloat16 at 16 rows each, 0.96 at 64 and 0.73 at 256.
_SMALL = 64

Product = Callable[[Tensor, Any, Tensor], Tensor]  # rows, weight, ends, as of `grouped_mm`


def grouped_mm(rows: Tensor, weight: Any, ends: Tensor) -> Tensor:
    """Grouped GEMM: rows [R, D] x weight [L, D, H] -> [R, H]. Rows ends[e-1]..ends[e] are multiplied by weight[e].

    Rows past ends[-1] are padding. The result and the gradient of `rows` are undefined there. An expert without rows
    gets a gradient of zeros.

    Args:
        rows: rows sorted by expert, [R, D].
        weight: one matrix for each expert, [L, D, H], in the dtype of `rows`; or a `FourBit`, which is frozen.
        ends: index after the last row of each expert, int32 [L].

    >>> weight = torch.stack([torch.eye(2), 10 * torch.eye(2)])
    >>> grouped_mm(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), weight, torch.tensor([1, 2], dtype=torch.int32)).tolist()
    [[1.0, 2.0], [30.0, 40.0]]
    """
    return grouped_product(rows, weight)(rows, weight, ends)


def grouped_product(rows: Tensor, *weights: Any) -> Product:
    """The implementation of `grouped_mm` for the dtype and device of `rows` and the layouts of `weights`."""
    if not isinstance(weights[0], Tensor):
        return weights[0].product()  # all are in 4 bits
    if transformed():
        return one_by_one
    smallest = min(side for weight in weights for side in weight.shape[1:])
    if computed(rows, smallest) == rows.dtype and all(fits_torch(rows, weight) for weight in weights):
        return _torch_grouped_mm
    return _grouped_mm


def grouped_bias(bias: Tensor, ends: Tensor, rows: int) -> Tensor:
    """The bias of each row's expert: bias [L, H] -> [rows, H]. `ends` is as in `grouped_mm`.

    Rows past ends[-1] are undefined. The gradient of an expert's bias is the sum over its rows, in float32 or float64,
    in a fixed order and rounded once.
    """
    if transformed():
        return bias[_owners(ends, rows)]
    return _grouped_bias(bias, ends, rows)


def _owners(ends: Tensor, rows: int) -> Tensor:
    """The expert of each row, int64 [rows]. Rows past ends[-1] get the last expert."""
    row = torch.arange(rows, device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends, row, right=True).clamp(max=len(ends) - 1)


def grouped_linear(
    rows: Tensor,
    ends: Tensor,
    matrix: Any,
    bias: Tensor | None,
    weight: Tensor | None = None,
    product: Product = grouped_mm,
) -> Tensor:
    """One linear layer of all experts: rows [R, in] x matrix [L, in, out] + bias [L, out] -> [R, out].

    Args:
        rows, ends: see `grouped_mm`.
        matrix: [L, in, out].
        bias: [L, out], or None.
        weight: router's weight [R] that `rows` were multiplied by, so that the bias must be as well. None, the
            default, for rows without weight.
        product: implementation that `grouped_product` chose; `grouped_mm` by default.
    """
    y = product(rows, matrix, ends)
    if bias is None:
        return y
    if weight is None:
        return y + grouped_bias(bias, ends, len(rows))
    return (y + grouped_bias(wide(bias), ends, len(rows)) * weight.unsqueeze(1)).to(rows.dtype)


def fits_torch(rows: Tensor, weight: Tensor) -> bool:
    """Whether F.grouped_mm takes these: no float64, 16-byte strides, 1023 matrices on CUDA, compiled only bfloat16."""
    if rows.dtype == torch.float64 or (torch.compiler.is_compiling() and rows.dtype != torch.bfloat16):
        return False
    if rows.is_cuda and len(weight) > 1023:
        return False
    size = rows.element_size()
    if any(s * size % 16 for s in weight.shape[1:]):  # strides of rows and result, also for axes of size 1
        return False
    return all(s == 1 or s * size % 16 == 0 for s in weight.stride())


@torch.compiler.allow_in_graph  # otherwise dynamo traces the autograd.Function and warns
def _torch_grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return _DenseGradient.apply(F.grouped_mm(rows, weight, offs=ends))  # pyright: ignore[reportReturnType]


class _DenseGradient(torch.autograd.Function):
    """Makes the gradient contiguous: torch's grouped_mm refuses the expanded one of ``y.sum().backward()``."""

    @staticmethod
    def forward(ctx, y):
        return y.detach()  # not a view, because FSDP2 warns about modules that return one

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        # contiguous() would return an empty tensor as it is, with any strides
        return grad.contiguous() if grad.numel() else grad.new_empty(grad.shape)


def mm(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """Write the product of two matrices to `out`, or with `add` add it.

    It is computed in the widest of three dtypes: those of `a` and `b`, and `computed` of `out`.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), computed(out, min(*a.shape, b.shape[1])))
    if not a.dtype == b.dtype == out.dtype == dtype:
        y = out if out.dtype == dtype else out.to(dtype) if add else torch.empty_like(out, dtype=dtype)
        mm(a.to(dtype), b.to(dtype), y, add)
        if y is not out:
            out.copy_(y)
    elif add:  # autocast does not change operators with `out`
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def computed(x: Tensor, smallest: int = _SMALL) -> torch.dtype:
    """The dtype in which to multiply matrices like x: its own, or float32 on a CPU that is faster at it.

    Args:
        x: a factor or the product.
        smallest: smallest of the product's three sizes; by default large enough for any dtype.
    """
    half = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    wider = half and (_emulated(x.dtype) or (smallest >= _SMALL and _slow(x.dtype)))
    return torch.float32 if wider else x.dtype


@torch.compiler.assume_constant_result
def _emulated(dtype: torch.dtype) -> bool:
    """Whether this CPU has no products of a half precision. torch then takes 4 to 90 times as long as in float32."""
    return not has_half_products(dtype)


@torch.compiler.assume_constant_result
def _slow(dtype: torch.dtype) -> bool:
    """Whether this CPU has such products, and large ones take longer than in float32 with conversions (1.4 times)."""
    return has_slow_half_products(dtype)


def one_by_one(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_mm` with operators that `torch.func` transforms and forward mode can differentiate."""
    *products, stop = *(rows[span] @ weight[e] for e, span in spans(ends)), int(ends[-1])
    return torch.cat([*products, rows.new_zeros(len(rows) - stop, weight.shape[2])])


def spans(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert with the slice of its rows."""
    stops = ends.tolist()
    return enumerate(map(slice, [0, *stops], stops))


@torch.library.custom_op("turnout::grouped_mm", mutates_args=())
def _grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    y = rows.new_empty(rows.shape[0], weight.shape[2])
    for e, span in spans(ends):
        mm(rows[span], weight[e], out=y[span])
    y[ends[-1] :] = 0  # padding
    return y


@torch.library.custom_op("turnout::grouped_mm_weight", mutates_args=())
def _grouped_mm_weight(rows: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """Gradient of the weight: rows [R, D], grad [R, H] -> [L, D, H]."""
    y = rows.new_empty(ends.shape[0], rows.shape[1], grad.shape[1])
    for e, span in spans(ends):  # a product over no rows is zeros
        mm(rows[span].T, grad[span], out=y[e])
    return y


@torch.library.custom_op("turnout::grouped_bias", mutates_args=())
def _grouped_bias(bias: Tensor, ends: Tensor, rows: int) -> Tensor:
    return bias.index_select(0, _owners(ends, rows))


@torch.library.custom_op("turnout::grouped_sum", mutates_args=())
def _grouped_sum(rows: Tensor, ends: Tensor) -> Tensor:
    """Gradient of the bias, the sum of each expert's rows: [R, H] -> [L, H]."""
    return _sum_of_spans(rows, ends) if rows.device.type == "cpu" else _sum_of_segments(rows, ends)


def _sum_of_spans(rows: Tensor, ends: Tensor) -> Tensor:
    out = rows.new_empty(len(ends), rows.shape[1])
    for e, span in spans(ends):
        sum_rows(rows[span], out[e])
    return out


def _sum_of_segments(rows: Tensor, ends: Tensor) -> Tensor:
    """Sum of each expert's rows without a host sync. It is slow on a CPU."""
    lengths = torch.diff(ends, prepend=ends.new_zeros(1)).long()
    return torch.segment_reduce(wide(rows), "sum", lengths=lengths, unsafe=True).to(rows.dtype)


def sum_rows(rows: Tensor, out: Tensor) -> None:
    """Write the sum of rows [n, H] to `out` [H], in float32 or float64: long half-precision sums stop growing."""
    out.copy_(rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)))


@_grouped_mm.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@_grouped_mm_weight.register_fake
def _(rows: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(ends.shape[0], rows.shape[1], grad.shape[1])


@_grouped_bias.register_fake
def _(bias: Tensor, ends: Tensor, rows: int) -> Tensor:
    return bias.new_empty(rows, bias.shape[1])


@_grouped_sum.register_fake
def _(rows: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(ends.shape[0], rows.shape[1])


def _save_inputs(ctx, inputs, output) -> None:
    a, b, ends = inputs
    needs_a, needs_b, *_ = ctx.needs_input_grad  # each gradient needs the other input: frozen experts save no rows
    ctx.save_for_backward(a if needs_b else None, b if needs_a else None, ends)


def _backward(ctx, grad: Tensor):
    rows, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    to_rows = _grouped_mm(grad, weight.mT, ends) if ctx.needs_input_grad[0] else None
    to_weight = _grouped_mm_weight(rows, grad, ends) if ctx.needs_input_grad[1] else None
    return to_rows, to_weight, None


def _weight_backward(ctx, grad: Tensor):
    rows, rows_grad, ends = ctx.saved_tensors
    to_rows = _grouped_mm(rows_grad, grad.mT, ends) if ctx.needs_input_grad[0] else None
    to_grad = _grouped_mm(rows, grad, ends) if ctx.needs_input_grad[1] else None
    return to_rows, to_grad, None


def _save_ends(ctx, inputs, output) -> None:
    first, ends, *_ = inputs
    ctx.rows = len(first)  # used for `_grouped_sum`
    ctx.save_for_backward(ends)


_grouped_mm.register_autograd(_backward, setup_context=_save_inputs)
_grouped_mm_weight.register_autograd(_weight_backward, setup_context=_save_inputs)
_grouped_bias.register_autograd(
    lambda ctx, grad: (_grouped_sum(grad.contiguous(), *ctx.saved_tensors), None, None), setup_context=_save_ends
)
_grouped_sum.register_autograd(
    lambda ctx, grad: (_grouped_bias(grad.contiguous(), *ctx.saved_tensors, ctx.rows), None), setup_context=_save_ends
)
