"""GShard gate: top-2 routing that keeps the second expert at random."""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing import Routing
from .gate import Gate, chosen_scores
from .router import route


class GShardGate(Gate):
    """Top-2 routing that keeps the second expert with probability min(1, 2 * its weight) in training.

    The two weights are normalised to sum to 1. In eval mode the second expert is always kept.

    Args:
        dim, num_experts, scale, bias: see `Gate`.
        top_k: must be 2.

    References:
        GShard: Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int = 2, scale: float = 1.0, bias: bool = False) -> None:
        super().__init__(dim, num_experts, top_k, scale, bias)

    def check_top_k(self, top_k: int) -> None:
        """See `Gate.check_top_k`. Here k must be 2."""
        super().check_top_k(top_k)
        if top_k != 2:
            raise ValueError(f"the gshard gate needs top_k=2; got top_k={top_k}: use gate='topk' for another number")

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [T, D]."""
        logits = self.logits(x)
        expert, weight, scores = route(logits, 2, normalize=True)
        routing = Routing(expert, self.scaled(weight), scores, logits, normalized=True)
        if not self.training:
            return routing
        return routing.keep(~(torch.rand_like(weight) >= 2 * weight))  # first weights are >= 1/2, so always kept

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """See `Gate.weigh`. The weight of a first expert stays the same if the second one was left out."""
        weight = chosen_scores(routing.scores, expert)
        others = routing.scores.scatter(1, expert[:, :1].clamp(min=0), 0.0).amax(1, keepdim=True)
        left_out = torch.where(expert[:, 1:] < 0, others, 0.0)
        return self.scaled(weight / (weight.sum(1, keepdim=True) + left_out))
