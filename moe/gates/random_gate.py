"""Random gate: experts drawn at random, as a baseline for learned routers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing import Routing
from .gate import Gate, distinct, even_routing
from .hash import hashed


class RandomGate(Gate):
    """Random routing: k experts drawn uniformly for each token, with weight 1/k each.

    In training they are drawn from torch's default generator. In eval mode nothing is random: a hash of the token's
    index on this rank chooses the experts, and spreads tokens as evenly.

    Args:
        dim, num_experts, top_k, scale: see `Gate`; `top_k` is 1 by default.

    References:
        THOR: Zuo et al. 2021, arXiv:2110.04260.
    """

    learned = False
    balances_itself = True

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [T, D]; only their number matters."""
        E, k = self.num_experts, self.top_k
        if not self.training:
            return even_routing(x, hashed(torch.arange(len(x), device=x.device), E, k), E, self.scale)
        draw = torch.randint(2**62, (len(x), k), device=x.device)  # so large that the remainders are uniform
        return even_routing(x, distinct(draw % (E - torch.arange(k, device=x.device))), E, self.scale)

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """See `Gate.weigh`."""
        return self.scaled(torch.full_like(expert, 1 / self.top_k, dtype=routing.weight.dtype))
