"""Grouped GEMMs of the experts in Triton: loads gather rows, and epilogues apply biases, activations and weights.

Import this module where it is used. Triton comes with torch's CUDA builds, and the package does not depend on it. Tests
compile the kernels for sm_80, sm_90 and sm_100 and run them in Triton's interpreter; **not run on a GPU yet**.

Rows are sorted by expert, and the rows of expert e end at ends[e], int32 [L]. With `token`, int64 [R], row r is
x[token[r]], or zeros if token[r] is -1. So x is never copied in the order of experts (ScatterMoE, arXiv:2403.08245;
SonicMoE, arXiv:2512.14080). Padding rows past ends[-1] are neither read nor written. There is no host sync: a grid has
as many tiles as there could be, and programs of unused tiles return at once. Sums are in float32, in a fixed order,
without atomics. torch.backends.cuda.matmul.fp32_precision sets the precision of float32 products.

Operands that are contiguous in memory, such as weights and rows that are not gathered, are loaded through tensor
descriptors if `Blocks.descriptors` is set. The host makes the descriptors for each launch from addresses and sizes
alone, so CUDA graphs may capture them.
"""

# A Triton kernel is an object, not the function that pyright sees.
# pyright: reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from triton import next_power_of_2
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import activations
from .grouped_kernels import bias_kernel, down_kernel, hidden_kernel, tiles_kernel, up_kernel, weight_kernel
from .scaled import Scaled, parts
from .tiles import Blocks, blocks


class Tiles(NamedTuple):
    """Rows of each program in a grid over row tiles.

    Attributes:
        expert: int32 [M], expert of each tile; -1 = unused tile.
        start: int32 [M], first row of each tile.
        ends: int32 [L], end of each expert's rows.
    """

    expert: Tensor
    start: Tensor
    ends: Tensor


class Groups:
    """Rows sorted by expert, and their cuts into tiles.

    Args:
        ends: int32 [L], end of each expert's rows.
        rows: number of rows R, at least ends[-1]. The others are padding.
    """

    def __init__(self, ends: Tensor, rows: int) -> None:
        self.ends, self.rows, self.average = ends, rows, rows // len(ends)
        self._tiles: dict[int, Tiles] = {}

    def tiles(self, size: int) -> Tiles:
        """Cut R rows into M = R // size + L tiles of `size` rows, each with rows of one expert; once for each size."""
        if size not in self._tiles:
            number, L = self.rows // size + len(self.ends), len(self.ends)
            expert, start = self.ends.new_empty(2, number)
            experts = next_power_of_2(L)
            many = max(1, min(128, 16384 // experts))  # tiles of a program, which compares each with all experts
            grid = (-(-number // many),)
            tiles_kernel[grid](self.ends, expert, start, number, L=L, SIZE=size, EXPERTS=experts, BM=many)
            self._tiles[size] = Tiles(expert, start, self.ends)
        return self._tiles[size]


def up(
    x: Tensor | Scaled,
    token: Tensor | None,
    groups: Groups,
    weight: Tensor,
    w_up: Tensor | Scaled,
    w_gate: Tensor | Scaled | None,
    activation: str,
    save: bool,
    b_up: Tensor | None = None,
    b_gate: Tensor | None = None,
    size: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Up and gate projections, activation, and multiplication by the router's weight: the hidden rows [R, H].

    Args:
        x: [T, D] if `token` is given, else rows [R, D]; in float8, then with matrices in float8.
        token: int64 [R], token in each row, -1 = empty row; None if x has the rows.
        groups: the rows of each expert.
        weight: [R], the router's weight of each row.
        w_up: [L, D, H], up projections. In float8 values are [L, H, D].
        w_gate: [L, D, H], gate projections; None for activations without a gate.
        activation: name of a function in `activations.py`.
        save: whether a backward follows.
        b_up: [L, H], biases of the up projections; None, the default, for no biases.
        b_gate: [L, H], biases of the gate projections; None, the default, for no biases.
        size: tile sizes; None, the default, takes them from `blocks`.

    Returns:
        The hidden rows [R, H], then up and gate before the activation, [R, H] each. The last two are empty if they are
        not saved or there is no gate.
    """
    dtype, (x, x_scale), (w_up, up_scale) = x.dtype, parts(x), parts(w_up)
    w_gate, gate_scale = (None, None) if w_gate is None else parts(w_gate)
    transposed = up_scale is not None
    (D, H), R = w_up.shape[:0:-1] if transposed else w_up.shape[1:], groups.rows
    hidden = x.new_empty(R, H, dtype=dtype)
    before, gate = (hidden.new_empty(R if save and wanted else 0, H) for wanted in (True, w_gate is not None))
    size = size or blocks("up", x, groups.average, (D, H))
    tiles = groups.tiles(size.rows)
    up_kernel[(_programs(tiles, H, size),)](
        _rows(x, token, size), x_scale, token, weight,
        _matrices(w_up, size, transposed), _matrices(w_gate, size, transposed), up_scale, gate_scale, b_up, b_gate,
        *tiles, before, gate, hidden, len(tiles.expert), D=D, H=H, TRANSPOSED=transposed,
        ACTIVATION=getattr(activations, activation), SAVE=save, **_constants(x, size),
    )  # fmt: skip
    return hidden, before, gate


def down(
    pairs: Sequence[tuple[Tensor | Scaled, Tensor | Scaled]],
    groups: Groups,
    transposed: bool = False,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    size: Blocks | None = None,
) -> Tensor:
    """Sum over one or two pairs (a, b) of the grouped GEMM of a [R, K] with b [L, K, N]: [R, N].

    Args:
        pairs: one or two pairs (a, b). In float8, values of b are [L, N, K], and two pairs have the same scales.
        groups: the rows of each expert.
        transposed: whether b is [L, N, K] instead, as always in float8; False by default.
        bias: [L, N], added times `weight`; None, the default, for no bias.
        weight: [R], the factor of the bias in each row.
        size: tile sizes; None, the default, takes them from `blocks`.
    """
    dtype, ((a, a_scale), (b, b_scale)) = pairs[0][0].dtype, map(parts, pairs[0])
    a2, b2 = (parts(t)[0] for t in pairs[1]) if len(pairs) == 2 else (None, None)
    transposed = transposed or b_scale is not None
    R, K = a.shape
    N = b.shape[1 if transposed else 2]
    out = a.new_empty(R, N, dtype=dtype)
    size = size or blocks("down", a, groups.average, (K, N))
    tiles = groups.tiles(size.rows)
    down_kernel[(_programs(tiles, N, size),)](
        _rows(a, None, size), _matrices(b, size, transposed), _rows(a2, None, size), _matrices(b2, size, transposed),
        a_scale, b_scale, bias, weight, *tiles, out, len(tiles.expert),
        K=K, N=N, TRANSPOSED=transposed, **_constants(a, size),
    )  # fmt: skip
    return out


def hidden_backward(
    grad: Tensor | Scaled,
    token: Tensor | None,
    groups: Groups,
    weight: Tensor,
    w_down: Tensor | Scaled,
    up: Tensor,
    gate: Tensor | None,
    activation: str,
    size: Blocks | None = None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Backward through the down projection and the activation.

    Args:
        grad: gradient of the output, [T, D] if `token` is given, else [R, D]; in float8, then with w_down in float8.
        token: int64 [R], token in each row, -1 = empty row; None if grad has the rows.
        groups: the rows of each expert.
        weight: [R], the router's weight of each row.
        w_down: [L, H, D], down projections, by rows in float8.
        up, gate: [R, H], values before the activation that `up` saved; gate is None without a gate projection.
        activation: name of a function in `activations.py`.
        size: tile sizes; None, the default, takes them from `blocks`.

    Returns:
        The hidden rows [R, H], recomputed; a list of the gradients of up and, if there is one, gate, [R, H] each; and
        the gradient of weight, float32 [R].
    """
    (grad, grad_scale), (w_down, down_scale) = parts(grad), parts(w_down)
    (_, H, D), R = w_down.shape, groups.rows
    hidden, to_up = torch.empty_like(up), torch.empty_like(up)
    to_gate = None if gate is None else torch.empty_like(gate)
    size = size or blocks("hidden", grad, groups.average, (D, H))
    tiles = groups.tiles(size.rows)
    to_weight = torch.zeros(-(-H // size.columns), R, device=grad.device)
    hidden_kernel[(_programs(tiles, H, size),)](
        _rows(grad, token, size), grad_scale, token, weight, _matrices(w_down, size, transposed=True), down_scale,
        *tiles, up, gate, to_up, to_gate, hidden, to_weight, len(tiles.expert), R,
        D=D, H=H, ACTIVATION=getattr(activations, activation), **_constants(grad, size),
    )  # fmt: skip
    return hidden, [to_up] if to_gate is None else [to_up, to_gate], to_weight.sum(0)


def weight_backward(
    a: Tensor,
    others: list[Tensor],
    groups: Groups,
    a_token: Tensor | None = None,
    b_token: Tensor | None = None,
    size: Blocks | None = None,
) -> list[Tensor]:
    """Gradients of the experts' matrices: a^T b over each expert's rows, [L, K, N], zeros for experts without rows.

    Args:
        a: [R, K], or [T, K] if `a_token` is given.
        others: one or two matrices b, [R, N], or [T, N] if `b_token` is given.
        groups: the rows of each expert.
        a_token: int64 [R], token of a in each row; None, the default, if a has the rows.
        b_token: int64 [R], token of b in each row; None, the default, if b has the rows.
        size: tile sizes; None, the default, takes them from `blocks`.

    Returns:
        One gradient [L, K, N] for each b.
    """
    K, N = a.shape[1], others[0].shape[1]
    ends = groups.ends
    out = [a.new_empty(len(ends), K, N) for _ in others]
    size = size or blocks("weight" if len(others) == 1 else "weights", a, 0, (K, N))
    tiles = -(-K // size.rows) * -(-N // size.columns)
    b, c, to_b, to_c = (*others, *out) if len(others) == 2 else (others[0], None, out[0], None)
    across = size.depth, size.columns
    weight_kernel[(tiles, len(ends))](
        _rows(a, a_token, size, (size.depth, size.rows)), _rows(b, b_token, size, across),
        _rows(c, b_token, size, across), a_token, b_token, ends, to_b, to_c, K=K, N=N, **_constants(a, size),
    )  # fmt: skip
    return out


def bias_backward(
    a: Tensor, groups: Groups, token: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of bias and weight in the summand weight [R] * bias [L, N] of `down`.

    Args:
        a: gradient of the rows, [R, N], or [T, N] if `token` is given.
        groups: the rows of each expert.
        token: int64 [R], token in each row; None, the default, if a has the rows.
        weight: [R], the factor of the bias; None, the default, if the bias is added without a factor.
        bias: [L, N]; None, the default, if there is no weight.

    Returns:
        Gradient of bias [L, N], and of weight, float32 [R], which is zeros without a weight.
    """
    ends, R, N = groups.ends, groups.rows, a.shape[1]
    size = blocks("bias", a, 0)
    to_bias = a.new_empty(len(ends), N)
    tiles = -(-N // size.columns)
    to_weight = torch.zeros(tiles, R, device=a.device)
    bias_kernel[(tiles, len(ends))](
        a, token, weight, bias, ends, to_bias, to_weight, R, N=N, **_constants(a, size)
    )  # fmt: skip
    return to_bias, to_weight.sum(0)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on CPU tensors: TRITON_INTERPRET was 1 when Triton was imported."""
    return "Interpreted" in type(up_kernel).__name__


def _rows(a: Tensor | None, token: Tensor | None, size: Blocks, block: tuple[int, int] | None = None):
    """Rows [R, K] as an argument of a kernel: a tensor descriptor of tiles `block`, or the tensor itself."""
    if a is None or token is not None or not _describable(a, size):
        return a
    return create_ragged_descriptor(a, block or (size.rows, size.depth))


def _matrices(b: Tensor | None, size: Blocks, transposed: bool = False):
    """Matrices [L, K, N], or [L, N, K] if `transposed`, as an argument of a kernel (see `_rows`)."""
    if b is None or not _describable(b, size):
        return b
    block = (size.columns, size.depth) if transposed else (size.depth, size.columns)
    return TensorDescriptor.from_tensor(b, [1, *block])


def _describable(t: Tensor, size: Blocks) -> bool:
    """Whether a tensor descriptor can describe this tensor: address and strides are multiples of 16 bytes."""
    steps = [t.data_ptr(), *(step * t.element_size() for step in t.stride()[:-1])]
    return size.descriptors and t.numel() > 0 and len(t) <= 2**30 and not any(step % 16 for step in steps)


def _programs(tiles: Tiles, columns: int, size: Blocks) -> int:
    return len(tiles.expert) * -(-columns // size.columns)


def _constants(x: Tensor, size: Blocks) -> dict[str, int | str]:
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "PRECISION": "tf32" if tf32 else "ieee",
        "BM": size.rows,
        "BN": size.columns,
        "BK": size.depth,
        "num_warps": size.warps,
        "num_stages": size.stages,
        "enable_fp_fusion": True,  # Triton's default until 3.10
    }
