"""Grouped matrix products of experts, in Triton: rows gathered in the loads, activations in the epilogues.

Import it where it is used: Triton comes with torch's CUDA builds and is no dependency of the package. The kernels
are compiled for sm_80, sm_90 and sm_100 and run in Triton's interpreter by the tests; **not run on a GPU yet**.

Rows are sorted by expert; those of expert e end at ends[e], int32 [L]. Where `token` is given, int64 [R], row r is
x[token[r]], zeros if that is -1, and no copy of x in the order of the experts is made (ScatterMoE, arXiv:2403.08245;
SonicMoE, arXiv:2512.14080). Rows past ends[-1] are read by nobody and stay as they are. The host never learns how
many rows an expert has: a grid has as many tiles as there could be, and those too many leave at once. Sums run in
float32 (float32 products as torch.backends.cuda.matmul.fp32_precision says), in a fixed order, without atomics.

What is read in the order of memory, weights and rows that are not gathered, goes through tensor descriptors where
`Blocks.descriptors` says so. They are made for each launch, by the host, from addresses and sizes alone, so that a
CUDA graph may keep them.
"""

# A kernel is not the function that it looks like.
# pyright: reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import activations
from .grouped_kernels import bias_kernel, down_kernel, hidden_kernel, up_kernel, weight_kernel
from .tiles import Blocks, Tiles, blocks


def up(
    x: Tensor,
    token: Tensor | None,
    ends: Tensor,
    weight: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    activation: str,
    save: bool,
    b_up: Tensor | None = None,
    b_gate: Tensor | None = None,
    size: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The hidden rows [R, H], times weight [R], and what the backward wants of them.

    Args:
        x: [T, D], gathered by `token`; rows [R, D] if that is None.
        w_up, w_gate: [L, D, H]; w_gate for gated activations alone.
        activation: the name of a function in `activations.py`.
        save: whether a backward follows.
        b_up, b_gate: [L, H], where there are biases.
        size: of the tiles, here and below; None: `blocks`.

    Returns:
        hidden; then up and gate before the activation, [R, H] each, empty where not asked for.
    """
    (_, D, H), R = w_up.shape, len(weight)
    hidden = x.new_empty(R, H)
    before, gate = (x.new_empty(R if save and wanted else 0, H) for wanted in (True, w_gate is not None))
    size = size or blocks("up", x, R // len(ends), (D, H))
    tiles = Tiles.of(ends, R, size.rows)
    up_kernel[(_programs(tiles, H, size),)](
        _rows(x, token, size), token, weight, _matrices(w_up, size), _matrices(w_gate, size), b_up, b_gate,
        *tiles, before, gate, hidden, len(tiles.expert),
        D=D, H=H, ACTIVATION=getattr(activations, activation), SAVE=save, **_constants(x, size),
    )  # fmt: skip
    return hidden, before, gate


def down(
    pairs: list[tuple[Tensor, Tensor]],
    ends: Tensor,
    transposed: bool = False,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    size: Blocks | None = None,
) -> Tensor:
    """The sum over one or two pairs (a [R, K], b [L, K, N]) of a times its expert's b: [R, N].

    With `transposed`, b is [L, N, K]. A bias [L, N] is added times weight [R].
    """
    (a, b), (a2, b2) = pairs[0], pairs[1] if len(pairs) == 2 else (None, None)
    R, K = a.shape
    N = b.shape[1 if transposed else 2]
    out = a.new_empty(R, N)
    size = size or blocks("down", a, R // len(ends), (K, N))
    tiles = Tiles.of(ends, R, size.rows)
    down_kernel[(_programs(tiles, N, size),)](
        _rows(a, None, size), _matrices(b, size, transposed), _rows(a2, None, size), _matrices(b2, size, transposed),
        bias, weight, *tiles, out, len(tiles.expert), K=K, N=N, TRANSPOSED=transposed, **_constants(a, size),
    )  # fmt: skip
    return out


def hidden_backward(
    grad: Tensor,
    token: Tensor | None,
    ends: Tensor,
    weight: Tensor,
    w_down: Tensor,
    up: Tensor,
    gate: Tensor | None,
    activation: str,
    size: Blocks | None = None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Back through the down projection w_down [L, H, D] and the activation, from grad [T, D] or [R, D] (see `up`).

    Returns:
        The hidden rows [R, H] as `up` made them, computed again; the gradients of up and, if there is one, of gate;
        the gradient of weight, float32 [R].
    """
    (_, H, D), R = w_down.shape, len(weight)
    hidden, to_up = torch.empty_like(up), torch.empty_like(up)
    to_gate = None if gate is None else torch.empty_like(gate)
    size = size or blocks("hidden", grad, R // len(ends), (D, H))
    tiles = Tiles.of(ends, R, size.rows)
    to_weight = torch.zeros(-(-H // size.columns), R, device=grad.device)
    hidden_kernel[(_programs(tiles, H, size),)](
        _rows(grad, token, size), token, weight, _matrices(w_down, size, transposed=True), *tiles,
        up, gate, to_up, to_gate, hidden, to_weight, len(tiles.expert), R,
        D=D, H=H, ACTIVATION=getattr(activations, activation), **_constants(grad, size),
    )  # fmt: skip
    return hidden, [to_up] if to_gate is None else [to_up, to_gate], to_weight.sum(0)


def weight_backward(
    a: Tensor,
    others: list[Tensor],
    ends: Tensor,
    a_token: Tensor | None = None,
    b_token: Tensor | None = None,
    size: Blocks | None = None,
) -> list[Tensor]:
    """Gradients of weights: per expert a^T b [L, K, N] for one or two b [R, N] in `others`; zeros without rows.

    a [R, K], or [T, K] gathered by a_token; the same for b_token.
    """
    K, N = a.shape[1], others[0].shape[1]
    out = [a.new_empty(len(ends), K, N) for _ in others]
    size = size or blocks("weight", a, 0, (K, N))
    tiles = -(-K // size.rows) * -(-N // size.columns)
    b, c, to_b, to_c = (*others, *out) if len(others) == 2 else (others[0], None, out[0], None)
    across = size.depth, size.columns
    weight_kernel[(tiles, len(ends))](
        _rows(a, a_token, size, (size.depth, size.rows)), _rows(b, b_token, size, across),
        _rows(c, b_token, size, across), a_token, b_token, ends, to_b, to_c, K=K, N=N, **_constants(a, size),
    )  # fmt: skip
    return out


def bias_backward(
    a: Tensor, ends: Tensor, token: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of what `down` adds, weight [R] * bias [L, N], from that of its rows: a [R, N], or gathered by token.

    Returns:
        Of bias, [L, N], and of weight, float32 [R]. Without weight and bias: of one that is added as it is, and zeros.
    """
    R, N = len(a if token is None else token), a.shape[1]
    size = blocks("bias", a, 0)
    to_bias = a.new_empty(len(ends), N)
    tiles = -(-N // size.columns)
    to_weight = torch.zeros(tiles, R, device=a.device)
    bias_kernel[(tiles, len(ends))](
        a, token, weight, bias, ends, to_bias, to_weight, R, N=N, **_constants(a, size)
    )  # fmt: skip
    return to_bias, to_weight.sum(0)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors: TRITON_INTERPRET=1 when it was imported."""
    return "Interpreted" in type(up_kernel).__name__


def _rows(a: Tensor | None, token: Tensor | None, size: Blocks, block: tuple[int, int] | None = None):
    """Rows [R, K] as a kernel takes them: a descriptor of tiles `block`, or the tensor itself."""
    if a is None or token is not None or not _describable(a, size):
        return a
    return create_ragged_descriptor(a, block or (size.rows, size.depth))


def _matrices(b: Tensor | None, size: Blocks, transposed: bool = False):
    """Matrices [L, K, N], or [L, N, K] if `transposed`, as a kernel takes them: see `_rows`."""
    if b is None or not _describable(b, size):
        return b
    block = (size.columns, size.depth) if transposed else (size.depth, size.columns)
    return TensorDescriptor.from_tensor(b, [1, *block])


def _describable(t: Tensor, size: Blocks) -> bool:
    """Whether the copy engine takes this tensor: what it starts from and steps by are multiples of 16 bytes."""
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
