"""Expert-choice gate: experts pick tokens, so loads are even by construction."""

from __future__ import annotations

import torch
from torch import Tensor

from ..capacity import capacity_limit
from ..routing import Routing
from .gate import Gate, chosen_scores


class ExpertChoiceGate(Gate):
    """Expert-choice routing: each expert takes the ceil(k T / E) tokens with its highest softmax scores.

    Loads are even, and a token may get any number of experts, also none. k is the mean number. **It is not causal**:
    an expert's choice depends on all T tokens of this rank's forward, later ones included. So it suits encoders. A
    language model trained with it has seen future tokens and cannot be sampled token by token.

    The routing always has `most` choices for each token, sorted by weight and filled up with -1. So its shape is known
    without a wait for the device.

    Args:
        dim, num_experts, scale, bias: see `Gate`.
        top_k: mean number of experts for each token; 2 by default. It is the paper's capacity factor c.
        most: most experts that a token keeps, by weight. None, the default, keeps all that took it. On one rank and
            without padding, memory grows with T * most rows. ``MoE(capacity=Capacity(1.0, pad=True))`` needs k * T.

    References:
        Expert choice: Zhou et al. 2022, arXiv:2202.09368.
    """

    balances_itself = True
    takes_mask = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        most: int | None = None,
        scale: float = 1.0,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, top_k, scale, bias)
        if most is not None and not 1 <= most <= num_experts:
            raise ValueError(f"most={most} must be between 1 and num_experts={num_experts}, or None")
        self.most = most

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route tokens x [T, D]. Experts take tokens where `mask`, bool [T], is False only if no others are left."""
        logits = self.logits(x)
        scores = logits.softmax(-1)
        wanted = scores.detach() if mask is None else torch.where(mask.unsqueeze(1), scores.detach(), -1.0)
        limit = capacity_limit(1.0, self.top_k, len(x), self.num_experts)
        chosen = torch.zeros_like(scores).scatter(0, wanted.topk(limit, dim=0).indices, 1.0) > 0
        most = self.num_experts if self.most is None else self.most
        _, expert = torch.where(chosen, wanted, -2.0).sort(dim=1, descending=True, stable=True)
        expert = expert[:, :most]
        routing = Routing(expert, self.scaled(scores.gather(1, expert)), scores, logits, normalized=True)
        return routing.keep(chosen.gather(1, expert))

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """See `Gate.weigh`."""
        return self.scaled(chosen_scores(routing.scores, expert))
