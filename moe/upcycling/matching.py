"""Matching of hidden units: the order in which the units of one expert are most like those of another."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch.reorder import wide
from ..experts import FeedForwardExperts
from ..gates.assignment import assign


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
        For each parameter of `experts`, that of `other`: [D, H], [H, D], [H] or [D].

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
    order = assign(both[1] @ both[0].T).argsort()
    own = {name: p.detach()[other] for name, p in experts.named_parameters(recurse=False)}
    return {name: t.index_select(axes[name], order) if name in axes else t for name, t in own.items()}
