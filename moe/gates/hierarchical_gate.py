"""Hierarchical gate: a first router picks groups of experts, a second one picks experts in each group."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..routing import Routing
from .gate import Gate, projected, topk_softmax, uniform
from .router import picks, weighed_in_groups


class HierarchicalGate(Gate):
    """Two-level routing: a token picks `top_groups` groups, and k / top_groups experts in each of them.

    An expert's weight is the weight of its group times its weight within the group. Each is a softmax over the choices
    at that level. Where only one is chosen, the softmax is over all, so that the level gets a gradient. The paper's
    noise is left out, and the layer's load-balancing loss uses the products of both levels' softmax scores. Group g is
    experts [g*E/G, (g+1)*E/G). It lies on one rank if the number of ranks divides G.

    Args:
        dim, num_experts, top_k, scale: see `Gate`; `top_k` is 2 by default.
        groups: number of groups G, a divisor of E. None, the default, takes the largest divisor up to sqrt(E).
        top_groups: number of groups that a token picks, a divisor of k. None, the default, takes the possible value
            nearest to sqrt(k).

    References:
        Shazeer et al. 2017, arXiv:1701.06538, appendix B, eq. 12.
    """

    groups: int = 1
    top_groups: int | None = None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        groups: int | None = None,
        top_groups: int | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(dim, num_experts, top_k, scale)
        if groups is None:
            groups = max(g for g in range(1, math.isqrt(num_experts) + 1) if num_experts % g == 0)
        if groups < 1 or num_experts % groups:
            raise ValueError(f"groups={groups} must divide num_experts={num_experts}")
        self.groups, self.top_groups = groups, top_groups
        self.check_top_k(top_k)  # now that the groups are known
        self.group_weight = nn.Parameter(torch.empty(groups, dim))
        uniform(self.group_weight)

    def reset_parameters(self) -> None:
        """Initialise the weights of both levels as `nn.Linear` does."""
        for weight in self.parameters(recurse=False):
            uniform(weight)
        self._reset_adapter()

    def check_top_k(self, top_k: int) -> None:
        """See `Gate.check_top_k`. Here each of a token's groups must give equally many experts."""
        super().check_top_k(top_k)
        picks(top_k, self.num_experts, self.groups, self.top_groups)

    def picks(self) -> tuple[int, int]:
        """Number of groups that a token picks, and number of experts in each."""
        return picks(self.top_k, self.num_experts, self.groups, self.top_groups)

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [T, D]. Logits are the sums of both levels' logits. Choices are sorted by weight."""
        top_groups, each = self.picks()
        outer = projected(x, self.group_weight)  # [T, G]
        inner = self.logits(x).unflatten(1, (self.groups, -1))  # [T, G, E/G]
        off = inner.isneginf().all(2)  # groups whose experts all have logit -inf, so none may be chosen
        outer, inner = outer.masked_fill(off, -torch.inf), inner.masked_fill(off.unsqueeze(2), 0)
        group_weight, group = topk_softmax(outer, top_groups)
        weight, place = topk_softmax(inner.take_along_dim(group.unsqueeze(2), 1), each)
        expert = group.unsqueeze(2) * inner.shape[2] + place
        weight, order = (group_weight.unsqueeze(2) * weight).flatten(1).sort(dim=1, descending=True, stable=True)
        scores = outer.softmax(1).unsqueeze(2) * inner.softmax(2)
        logits = outer.unsqueeze(2) + inner
        expert, weight = expert.flatten(1).gather(1, order), self.scaled(weight)
        return Routing(expert, weight, scores.flatten(1), logits.flatten(1))

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """See `Gate.weigh`."""
        return self.scaled(weighed_in_groups(routing.scores, expert, self.groups, *self.picks()))

    def extra_repr(self) -> str:
        """Text that ``print(model)`` shows."""
        return f"{super().extra_repr()}, groups={self.groups}, top_groups={self.picks()[0]}"
