"""Experts choose tokens, in place of tokens experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..capacity import capacity_limit
from ..routing import Routing
from .gate import Gate, taken


class ExpertChoiceGate(Gate):
    """Each expert takes the ceil(k T / E) tokens of highest softmax score (Zhou et al. 2022, arXiv:2202.09368).

    Loads are even by construction, and a token gets any number of experts, none included; k is their mean.
    **Not causal**: whether an expert takes a token depends on all T tokens of this rank's forward, later ones
    of the same sequence and other sequences among them. So it suits encoders; a language model trained with it
    has seen the future and cannot be sampled from token by token.

    A routing is `most` choices wide, heaviest first and then -1, whatever the tokens: nothing waits for the device.

    Args:
        dim, num_experts, scale, bias: see `Gate`.
        top_k: experts a token gets on average, the paper's capacity factor c.
        most: experts a token keeps at most, the heaviest; None: as many as took it, E at most. On one rank,
            without `pad`, memory grows with T * most rows; ``MoE(capacity=Capacity(1.0, pad=True))`` needs k * T.
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
            raise ValueError(f"most={most} must lie between 1 and num_experts={num_experts}, or be None")
        self.most = most

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route tokens x [T, D]; where `mask`, bool [T], is False, no expert takes a token while others are left."""
        logits = self.logits(x)
        scores = logits.softmax(-1)
        wanted = scores.detach() if mask is None else torch.where(mask.unsqueeze(1), scores.detach(), -1.0)
        limit = capacity_limit(1.0, self.top_k, len(x), self.num_experts)
        chosen = torch.zeros_like(scores).scatter(0, wanted.topk(limit, dim=0).indices, 1.0) > 0
        most = self.num_experts if self.most is None else self.most
        _, expert = torch.where(chosen, wanted, -2.0).sort(dim=1, descending=True, stable=True)
        expert = expert[:, :most]
        return Routing(expert, self.scaled(scores.gather(1, expert)), scores, logits).keep(chosen.gather(1, expert))

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """See `Gate.weigh`."""
        return self.scaled(taken(routing.scores, expert))
