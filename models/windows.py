"""Attention inside the windows of an image, as in Swin Transformer V2. Hidden states are [B, height, width, D]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..moe.gates.gate import projected
from .recompute import Core

MOST = math.log(100.0)  # largest logarithm of the scale of cosines, as in the paper
TO_WINDOWS = "b (nh wh) (nw ww) (heads d) -> b (nh nw) heads (wh ww) d"
FROM_WINDOWS = "b (nh nw) heads (wh ww) d -> b (nh wh) (nw ww) (heads d)"


class WindowAttention(nn.Module):
    """Multi-head attention inside windows: softmax(scale * cos(q, k) + bias of relative positions) v.

    An axis of the image that is not longer than the window is one window. The scale is learned for each head, starts
    at 10 and is at most 100. Cosines and bias are computed in float32 or float64, then rounded to the dtype of the
    values.

    Args:
        dim: width D, a multiple of `heads`.
        heads: number of attention heads.
        window: length of a window's sides.
        shifted: whether windows lie half a window further down and right. The last ones then continue at the opposite
            edge, where tokens of the two edges do not attend to each other. Axes of one window are not shifted.
        pretrained_window: see `PositionBias`; 0 by default.

    References:
        Swin Transformer V2: Liu et al. 2021, arXiv:2111.09883.
    """

    def __init__(self, dim: int, heads: int, window: int, shifted: bool, pretrained_window: int = 0) -> None:
        super().__init__()
        self.heads, self.window, self.shifted = heads, window, shifted
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(10.0)))
        self.position_bias = PositionBias(heads, pretrained_window)
        self.core = Core()
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, height, width, D] -> the same shape; each side is at most `window`, or a multiple of it."""
        sides = x.shape[1:3]
        window = [min(self.window, side) for side in sides]
        shift = [size // 2 if self.shifted and size < side else 0 for size, side in zip(window, sides, strict=True)]
        moves = any(shift)
        if moves:
            x = x.roll([-by for by in shift], (1, 2))
        q, k, v = (self._windows(project(x), window) for project in (self.query, self.key, self.value))
        scale = self.log_scale.to(torch.promote_types(q.dtype, torch.float32)).clamp(max=MOST).exp()
        q, k = _unit(q) * scale[:, None, None], _unit(k)
        mask = self.position_bias(*window)
        if moves:
            together = same_region(sides, window, shift, x.device)
            mask = mask.masked_fill(~together[:, None], -math.inf)
        # cosines are scaled already: undo the division by sqrt(d)
        q = q * math.sqrt(q.shape[-1])
        y = self.core(q.to(v.dtype), k.to(v.dtype), v, mask=mask.to(v.dtype))
        rows = sides[0] // window[0]
        y = self.out(rearrange(y, FROM_WINDOWS, nh=rows, wh=window[0]))
        return y.roll(shift, (1, 2)) if moves else y

    def _windows(self, x: Tensor, window: Sequence[int]) -> Tensor:
        return rearrange(x, TO_WINDOWS, wh=window[0], ww=window[1], heads=self.heads)


class PositionBias(nn.Module):
    """Bias of attention scores from relative positions: an MLP of their logarithms (log-spaced continuous bias).

    An offset of y and x is divided by the window's side less 1, times 8, and becomes sign(o) log8(1 + |o|). The MLP has
    one hidden layer of 512. Because it is continuous, another window needs no new parameters.

    Args:
        heads: number of attention heads.
        pretrained_window: side that offsets are divided by, less 1: that of the window in pre-training if the window
            has changed since. 0, the default, takes the window of each forward.
    """

    def __init__(self, heads: int, pretrained_window: int = 0) -> None:
        super().__init__()
        self.pretrained_window = pretrained_window
        self.up = nn.Linear(2, 512)
        self.down = nn.Linear(512, heads, bias=False)
        nn.init.trunc_normal_(self.up.weight, std=0.02)
        nn.init.zeros_(self.up.bias)
        nn.init.trunc_normal_(self.down.weight, std=0.02)

    def forward(self, height: int, width: int) -> Tensor:
        """Bias of each query and key of a window, float32 or float64 [heads, height * width, height * width]."""
        axes = [self._spaced(side) for side in (height, width)]
        offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
        hidden = projected(offsets, self.up.weight, self.up.bias).relu()
        # The paper's 16 sigmoid(b), less 8: the softmax does not see the 8, and bfloat16 has finer steps around 0.
        table = 8 * (projected(hidden, self.down.weight) / 2).tanh()
        table = rearrange(table, "(y x) heads -> heads y x", y=2 * height - 1)
        # The offset of query i and key j is at i - j + side - 1: the table's window from i on, read backwards.
        table = table.unfold(1, height, 1).unfold(2, width, 1).flip(3, 4)
        return rearrange(table, "heads qy qx ky kx -> heads (qy qx) (ky kx)")

    def _spaced(self, side: int) -> Tensor:
        weight = self.up.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        offset = torch.arange(1 - side, side, dtype=dtype, device=weight.device)
        offset = 8 * offset / max((self.pretrained_window or side) - 1, 1)
        return offset.sign() * (offset.abs() + 1).log2() / 3


def same_region(
    sides: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device | None = None
) -> Tensor:
    """Whether two tokens of a shifted window are neighbours in the image, bool [windows, N, N] for N tokens in each.

    An image rolled by `shift` has its first rows and columns at the end, beside tokens of the opposite edge.

    >>> same_region((4, 2), (2, 2), (1, 0)).int()[:, 0].tolist()  # the first token of each of the two windows
    [[1, 1, 1, 1], [1, 1, 0, 0]]
    """
    crossed = [torch.arange(side, device=device) >= side - by for side, by in zip(sides, shift, strict=True)]
    region = 2 * crossed[0][:, None] + 1 * crossed[1]
    region = rearrange(region, "(nh wh) (nw ww) -> (nh nw) (wh ww)", wh=window[0], ww=window[1])
    return region[:, :, None] == region[:, None, :]


def _unit(x: Tensor) -> Tensor:
    """Vectors of length 1 along the last axis, in float32 or float64."""
    # the default eps makes the gradient of a key that is zero too large
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-6)
