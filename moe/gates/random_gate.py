"""Experts at random: the baseline a learned router has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing import Routing
from .gate import Gate, distinct, even
from .hash import hashed


class RandomGate(Gate):
    """k experts drawn evenly for each token, whatever it is, weight 1/k each (THOR, arXiv:2110.04260).

    In training they are drawn from torch's generator. Nothing is random in eval: there a token's place
    among this rank's tokens decides, through a hash, which spreads them as evenly.
    """

    learned = False
    balances_itself = True

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [T, D]."""
        E, k = self.num_experts, self.top_k
        if not self.training:
            return even(x, hashed(torch.arange(len(x), device=x.device), E, k), E, self.scale)
        draw = torch.randint(2**62, (len(x), k), device=x.device)  # many times E: the remainder is even
        return even(x, distinct(draw % (E - torch.arange(k, device=x.device)), E), E, self.scale)

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """See `Gate.weigh`."""
        return self.scaled(torch.full_like(expert, 1 / self.top_k, dtype=routing.weight.dtype))
