"""Grouped matrix products of experts, in Triton: rows gathered in the loads, activations in the epilogues.

Import it where it is used: Triton comes with torch's CUDA builds and is no dependency of the package. The kernels
are compiled for sm_80, sm_90 and sm_100 and run in Triton's interpreter by the tests; **not run on a GPU yet**.

Rows are sorted by expert; those of expert e end at ends[e], int32 [L]. Where `token` is given, int64 [R], row r is
x[token[r]], zeros if that is -1, and no copy of x in the order of the experts is made (ScatterMoE, arXiv:2403.08245;
SonicMoE, arXiv:2512.14080). Rows past ends[-1] are read by nobody and stay as they are. The host never learns how
many rows an expert has: a grid has as many tiles as there could be, and those too many leave at once. Sums run in
float32 (float32 products as torch.backends.cuda.matmul allows), in a fixed order, without atomics.
"""

# A kernel is not the function that it looks like.
# pyright: reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

import torch
from torch import Tensor

from .grouped_kernels import down_kernel, hidden_kernel, up_kernel, weight_kernel
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
    size: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The hidden rows [R, H], times weight [R], and what the backward wants of them.

    Args:
        x: [T, D], gathered by `token`; rows [R, D] if that is None.
        w_up, w_gate: [L, D, H]; w_gate for "swiglu" alone.
        activation: "swiglu", "gelu" or "relu".
        save: whether a backward follows.
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
        x, token, weight, w_up, w_up if w_gate is None else w_gate, *tiles, before, gate, hidden, len(tiles.expert),
        D=D, H=H, ACTIVATION=activation, GATHER=token is not None, SAVE=save, **_constants(x, size),
    )  # fmt: skip
    return hidden, before, gate


def down(
    pairs: list[tuple[Tensor, Tensor]], ends: Tensor, transposed: bool = False, size: Blocks | None = None
) -> Tensor:
    """The sum over one or two pairs (a [R, K], b [L, K, N]) of a times its expert's b: [R, N].

    With `transposed`, b is [L, N, K].
    """
    (a, b), (a2, b2) = pairs[0], pairs[-1]
    R, K = a.shape
    N = b.shape[1 if transposed else 2]
    out = a.new_empty(R, N)
    size = size or blocks("down", a, R // len(ends), (K, N))
    tiles = Tiles.of(ends, R, size.rows)
    down_kernel[(_programs(tiles, N, size),)](
        a, b, a2, b2, *tiles, out, len(tiles.expert),
        K=K, N=N, TRANSPOSED=transposed, PAIR=len(pairs) == 2, **_constants(a, size),
    )  # fmt: skip
    return out


def hidden_backward(
    grad: Tensor,
    token: Tensor | None,
    ends: Tensor,
    weight: Tensor,
    w_down: Tensor,
    up: Tensor,
    gate: Tensor,
    activation: str,
    size: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Back through the down projection w_down [L, H, D] and the activation, from grad [T, D] or [R, D] (see `up`).

    Returns:
        The hidden rows [R, H] as `up` made them, computed again; the gradients of up, of gate (empty if there is
        none) and of weight, float32 [R].
    """
    (_, H, D), R = w_down.shape, len(weight)
    hidden, to_up, to_gate = (torch.empty_like(t) for t in (up, up, gate))
    size = size or blocks("hidden", grad, R // len(ends), (D, H))
    tiles = Tiles.of(ends, R, size.rows)
    to_weight = torch.zeros(-(-H // size.columns), R, device=grad.device)
    hidden_kernel[(_programs(tiles, H, size),)](
        grad, token, weight, w_down, *tiles, up, gate, to_up, to_gate, hidden, to_weight, len(tiles.expert), R,
        D=D, H=H, ACTIVATION=activation, GATHER=token is not None, **_constants(grad, size),
    )  # fmt: skip
    return hidden, to_up, to_gate, to_weight.sum(0)


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
    b, c = others[0], others[-1]
    K, N = a.shape[1], b.shape[1]
    out = [a.new_empty(len(ends), K, N) for _ in others]
    size = size or blocks("weight", a, 0, (K, N))
    tiles = -(-K // size.rows) * -(-N // size.columns)
    weight_kernel[(tiles, len(ends))](
        a, b, c, a_token, b_token, ends, out[0], out[-1], K=K, N=N, GATHER_A=a_token is not None,
        GATHER_B=b_token is not None, BOTH=len(others) == 2, **_constants(a, size),
    )  # fmt: skip
    return out


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors: TRITON_INTERPRET=1 when it was imported."""
    return "Interpreted" in type(up_kernel).__name__


def _programs(tiles: Tiles, columns: int, size: Blocks) -> int:
    return len(tiles.expert) * -(-columns // size.columns)


def _constants(x: Tensor, size: Blocks) -> dict[str, int | str]:
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {
        "PRECISION": "tf32" if tf32 else "ieee",
        "BM": size.rows,
        "BN": size.columns,
        "BK": size.depth,
        "num_warps": size.warps,
        "num_stages": size.stages,
        "enable_fp_fusion": True,  # Triton's default until 3.10
    }
