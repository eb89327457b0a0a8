"""Sigmoid scores, balanced by a bias on the choice; groups of experts first, if there are any."""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing import Routing
from .base import normalised
from .biased import BiasedGate
from .router import route


class SigmoidGate(BiasedGate):
    """The k experts of highest sigmoid(x W) + bias; the weight is without the bias (DeepSeek-V3, arXiv:2412.19437).

    The bias keeps loads even without an auxiliary loss, if `balance_biases(model)` is called once a step
    (`BiasedGate`).

    With groups, a token's experts come from `top_groups` of them: those whose k / top_groups best experts, with
    bias, have the largest sum. Group g is experts [g*E/G, (g+1)*E/G): G nodes make it "node-limited".

    Args:
        dim, num_experts, top_k, scale: see `Gate`.
        rate: the bias's step; 0 leaves it as it is.
        normalize: divide the k weights by their sum.
        groups, top_groups: G, a divisor of E, and how many of them a token may go to; None: all.
        balance_loss: let the layer add its balance loss, as the paper does with `balance="sequence"` and a
            weight of 1e-4.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        rate: float = 1e-3,
        normalize: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        top_groups: int | None = None,
        balance_loss: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, top_k, rate, scale)
        top_groups = groups if top_groups is None else top_groups
        if groups < 1 or num_experts % groups or not 1 <= top_groups <= groups:
            raise ValueError(
                f"groups={groups} must divide num_experts={num_experts}, and top_groups={top_groups} be one of 1 to it"
            )
        self.normalize = normalize
        self.groups, self.top_groups, self.balances_itself = groups, top_groups, not balance_loss

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [T, D]; scores are the sigmoids, without bias."""
        logits = self.logits(x)
        if self.top_groups == self.groups:
            expert, weight, scores = route(logits, self.top_k, "sigmoid", self.normalize, self.bias)
        else:
            scores = logits.sigmoid()
            allowed = in_groups(scores.detach() + self.bias, self.top_k, self.groups, self.top_groups)
            expert = allowed.topk(self.top_k).indices
            weight = scores.gather(1, expert)
            weight = normalised(weight) if self.normalize else weight
        return Routing(expert, self.scaled(weight), scores, logits)


def in_groups(biased: Tensor, k: int, groups: int, top_groups: int) -> Tensor:
    """Biased scores [T, E], -inf where an expert's group is not among the best."""
    by_group = biased.unflatten(1, (groups, -1))  # [T, G, E/G]
    if k > (room := top_groups * by_group.shape[2]):
        raise ValueError(f"top_k={k}, but top_groups={top_groups} have only {room} experts")
    value = by_group.topk(max(k // top_groups, 1)).values.sum(-1)  # [T, G]
    chosen = torch.zeros_like(value).scatter(1, value.topk(top_groups).indices, 1.0) > 0
    return torch.where(chosen.unsqueeze(2), by_group, -torch.inf).flatten(1)
