"""Rows that lie in blocks, and the index that puts the blocks in another order.

Every change of layout between ranks is one of these: what arrives lies by (source rank, expert) and is
wanted by (expert, source rank).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def reorder(counts: Tensor, pattern: str, rows: int) -> tuple[Tensor, Tensor]:
    """Index that lays blocks of rows out in the order of an einops pattern.

    Args:
        counts: int64, one axis per name of the pattern's left side: the size of each block, the blocks
            lying in reading order.
        pattern: a permutation of axes, as in ``"source expert -> expert source"``.
        rows: the sum of `counts`, which the host knows: asking the device would wait for it.

    Returns:
        ``(order, counts)``: int64 [rows] with new_rows = old_rows[order], and the sizes permuted.

    >>> order, sizes = reorder(torch.tensor([[1, 2], [1, 0]]), "s e -> e s", rows=4)
    >>> order.tolist(), sizes.tolist()
    ([0, 3, 1, 2], [[1, 1], [2, 0]])
    """
    starts = (counts.flatten().cumsum(0) - counts.flatten()).reshape(counts.shape)
    new, first = rearrange(counts, pattern), rearrange(starts, pattern)
    sizes = new.flatten()
    shift = torch.repeat_interleave(first.flatten() - (sizes.cumsum(0) - sizes), sizes, output_size=rows)
    return shift + torch.arange(rows, device=counts.device), new


def invert(order: Tensor) -> Tensor:
    """The inverse of a permutation int64 [R]: invert(order)[order[r]] = r."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
