"""Permutations of blocks of rows, such as from (source rank, expert) to (expert, source rank).

Rows arrive in blocks by (source rank, expert), and experts need them by (expert, source rank).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def reorder(counts: Tensor, pattern: str, rows: int) -> tuple[Tensor, Tensor]:
    """Index that permutes blocks of rows by an einops pattern.

    Args:
        counts: int64, size of each block, with one axis for each name on the pattern's left side. Blocks lie in
            row-major order.
        pattern: permutation of the axes, such as ``"source expert -> expert source"``.
        rows: the sum of `counts`. The caller passes it, because reading it from the device would be a host sync.

    Returns:
        ``(order, counts)``: int64 [rows] with new_rows = old_rows[order], and the permuted sizes.

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
    """Inverse of a permutation int64 [R]: invert(order)[order[r]] = r.

    >>> invert(torch.tensor([2, 0, 1])).tolist()
    [1, 2, 0]
    """
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


def shares(number: int, degree: int) -> list[int]:
    """Cut a number into nearly equal parts.

    >>> shares(7, 3), shares(1, 3)
    ([2, 2, 3], [0, 0, 1])
    """
    return [(i + 1) * number // degree - i * number // degree for i in range(degree)]
