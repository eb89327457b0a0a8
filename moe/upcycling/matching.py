"""Matching of hidden units: the order in which the units of one expert are most like the units of another."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...dispatch.reorder import wide
from ..experts import FeedForwardExperts


@torch.no_grad()
def matched(experts: FeedForwardExperts, reference: int, other: int) -> dict[str, Tensor]:
    """Tensors of an expert, by name, with its hidden units in the order that is most like a reference expert's.

    An expert computes the same whatever the order of its hidden units is. So two experts that compute nearly the same
    may have weights that are far apart. Of all orders this one has the largest sum, over units, of the inner product of
    the weights that belong to a unit: columns of W_up and W_gate, and a row of W_down.

    Args:
        experts: feed-forward experts on one rank. They are not changed.
        reference: id of the expert whose units keep their order.
        other: id of the expert whose units are ordered.

    Returns:
        Every parameter of the expert `other`: [D, H], [H, D], [H] or [D].

    References:
        Git Re-Basin, arXiv:2209.04836, section 3.2. Before experts are merged: MC-SMoE, arXiv:2310.01334.

    >>> experts = FeedForwardExperts(dim=4, hidden=3, num_experts=2)
    >>> for name, axis in experts.split_axes().items():  # make the second expert the first one, in another order
    ...     p = getattr(experts, name).data
    ...     p[1] = p[0].index_select(axis - 1, torch.tensor([2, 0, 1]))
    >>> torch.equal(matched(experts, reference=0, other=1)["w_up"], experts.w_up[0])
    True
    """
    axes = {name: axis - 1 for name, axis in experts.split_axes().items() if name != "b_down"}  # of one expert's units
    both = []
    for expert in (reference, other):
        each = [
            wide(getattr(experts, name).detach()[expert]).movedim(axis, 0).reshape(experts.hidden, -1)
            for name, axis in axes.items()
        ]
        both.append(torch.cat(each, dim=1))
    order = best_order(both[0] @ both[1].T).to(both[0].device)
    own = {name: p.detach()[other] for name, p in experts.named_parameters(recurse=False)}
    return {name: t.index_select(axes[name], order) if name in axes else t for name, t in own.items()}


def best_order(gain: Tensor) -> Tensor:
    """A column for each row, each column once, with the largest possible sum of the numbers there.

    The CPU computes it in float64: seconds for n = 2048.

    Args:
        gain: numbers [n, n]. NaN and infinite ones count as 0.

    Returns:
        Columns int64 [n], on the CPU.

    References:
        Shortest augmenting paths: Jonker and Volgenant 1987, Computing 38.

    >>> best_order(torch.tensor([[3.0, 2.0], [2.0, 0.0]])).tolist()
    [1, 0]
    """
    # Not `assign` of gates, which is made for few experts and many tokens: as exact, but 1.8 s in place of 0.23 s for
    # n = 512, and 4.4 s in place of 0.12 s for 1,024 units that have a likeness (one core of a Xeon, torch 2.13).
    cost = -gain.double().cpu().nan_to_num(0, 0, 0).numpy()
    n = len(cost)
    # Prices of rows and columns: no cost is below the sum of its two prices, and a row pays just that for its column.
    of_column = cost.min(0, initial=np.inf)
    of_row = (cost - of_column).min(1, initial=np.inf)
    row_of, column_of = np.full(n, -1), np.full(n, -1)
    for start in range(n):
        # Dijkstra's search for the cheapest path from this row to a free column. On it, rows exchange their columns.
        open_columns, distance, before = np.ones(n, bool), np.full(n, np.inf), np.full(n, -1)
        row, walked = start, 0.0
        while True:
            through = walked + (cost[row] - of_row[row] - of_column)
            nearer = open_columns & (through < distance)
            distance[nearer], before[nearer] = through[nearer], row
            column = int(np.where(open_columns, distance, np.inf).argmin())
            walked, row = distance[column], row_of[column]
            if row < 0:
                break
            open_columns[column] = False
        passed = ~open_columns
        of_row[start] += walked
        of_row[row_of[passed]] += walked - distance[passed]
        of_column[passed] -= walked - distance[passed]
        while row != start:
            row = row_of[column] = before[column]
            column_of[row], column = column, column_of[row]
    return torch.from_numpy(column_of)
