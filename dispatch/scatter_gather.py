"""Differentiable scatter and gather of rows, of different numbers for each rank."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .collectives import all_to_all


def scatter(x: Tensor, sizes: list[int], root: int, group: ProcessGroup | None) -> Tensor:
    """Send each rank its part of the root's rows: x [sum(sizes), ...] on the root -> [sizes[w], ...] on rank w.

    It is an all-to-all in which only the root sends rows. With root 0 and ``sizes`` = [1, 2]::

        rank 0: a | b c   -> to 0: a, to 1: b c          rank 0 has  a
        rank 1:           -> nothing                     rank 1 has  b c

    The backward is `gather`, a collective too. So x must require a gradient on all ranks or on none.

    Args:
        x: [sum(sizes), ...] on the root; [0, ...] elsewhere, with the same trailing shape and dtype.
        sizes: rows for each rank, the same W numbers on all ranks. They may be 0.
        root: rank of the root in the group.
        group: the ranks; None is the default group.

    Returns:
        [sizes[w], ...] on rank w.

    Raises:
        ValueError: `sizes` or `root` does not fit the group, or x does not have the rows that `sizes` says.
    """
    send, recv = _one_sided(sizes, root, group)
    _check_rows(x, sum(send), "scatter")
    return all_to_all(x, send=send, recv=recv, group=group)[0]


def gather(x: Tensor, sizes: list[int], root: int, group: ProcessGroup | None) -> Tensor:
    """Collect the rows of all ranks on the root: x [sizes[w], ...] on rank w -> [sum(sizes), ...] on the root.

    It is an all-to-all in which only the root receives rows. With root 0 and ``sizes`` = [1, 2]::

        rank 0: a         -> to 0: a                     rank 0 has  a b c
        rank 1: b c       -> to 0: b c                   rank 1 has  nothing

    The backward is `scatter`. So every rank must call backward, the others through their empty result.

    Args:
        x: [sizes[w], ...] on rank w, with the same trailing shape and dtype everywhere.
        sizes: rows of each rank, the same W numbers on all ranks. They may be 0.
        root: rank of the root in the group.
        group: the ranks; None is the default group.

    Returns:
        [sum(sizes), ...] on the root, in the order of ranks; [0, ...] elsewhere.

    Raises:
        ValueError: `sizes` or `root` does not fit the group, or x does not have the rows that `sizes` says.
    """
    recv, send = _one_sided(sizes, root, group)
    _check_rows(x, sum(send), "gather")
    return all_to_all(x, send=send, recv=recv, group=group)[0]


def _one_sided(sizes: list[int], root: int, group: ProcessGroup | None) -> tuple[list[int], list[int]]:
    """Rows to each rank and rows from each rank, in a scatter. In a gather they are swapped."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if len(sizes) != ranks or not 0 <= root < ranks:
        raise ValueError(
            f"sizes must have a number for each of {ranks} ranks, and root must be below {ranks}; "
            f"got sizes={sizes}, root={root}"
        )
    own = [sizes[rank] if w == root else 0 for w in range(ranks)]
    return (sizes if rank == root else [0] * ranks), own


def _check_rows(x: Tensor, rows: int, what: str) -> None:
    if x.ndim == 0 or x.shape[0] != rows:
        raise ValueError(f"{what}: x must be [{rows}, ...] on this rank, as sizes says; got {tuple(x.shape)}")
