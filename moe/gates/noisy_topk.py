"""Top-k of noisy logits, balanced by importance and load."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import cv_squared
from ..routing import Routing
from .gate import Gate, best, normalised, projected, taken


class NoisyTopKGate(Gate):
    """The k best of logits with learned noise (Shazeer et al. 2017, arXiv:1701.06538, eq. 3-5, appendix A).

    In training the logits x W_g get normal noise, scaled for each token and expert by softplus(x W_noise)
    plus a floor. Softmax over the k chosen; for k = 1 over all, lest the weight be the constant 1 and the
    router get no gradient. It balances by the paper's own losses, over this rank's tokens, in place of the
    balance loss: "importance", CV^2 of the experts' sums of weights, and "load", CV^2 of how many tokens an
    expert is to expect. Load is counted, without gradient, where there is no noise or no choice (k = E).

    Both matrices start at zero, as in the paper: until it has learned, noise alone decides and loads are
    equal. In eval, an untrained one sends all tokens to the same k experts.

    Args:
        dim, num_experts, top_k, scale, bias: see `Gate`.
        noise_floor: the least standard deviation of the noise; the paper's code has 1e-2.
    """

    balances_itself = True
    takes_mask = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        noise_floor: float = 1e-2,
        scale: float = 1.0,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, top_k, scale, bias)
        if noise_floor <= 0:
            raise ValueError(f"noise_floor must be positive, for load divides by the noise; got {noise_floor}")
        self.noise_floor = noise_floor
        self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))

    def reset_parameters(self) -> None:
        """Initialise both matrices, and the bias, with zeros."""
        for p in self.parameters(recurse=False):
            nn.init.zeros_(p)
        self._reset_adapter()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route tokens x [T, D]; scores are without noise. The losses leave out where `mask`, bool [T], is False."""
        logits = noisy = self.logits(x)
        deviation = None
        if self.training:
            deviation = F.softplus(projected(x, self.noise_weight)) + self.noise_floor
            noisy = logits + deviation * torch.randn_like(logits)
        weight, expert = best(noisy, self.top_k)
        gates = torch.zeros_like(logits).scatter(1, expert, weight)
        if deviation is None or self.top_k == self.num_experts:
            chance = torch.zeros_like(logits).scatter(1, expert, 1.0)
        else:
            chance = chosen_chance(logits, noisy, deviation, self.top_k)
        if mask is not None:
            gates, chance = (torch.where(mask.unsqueeze(1), each, 0) for each in (gates, chance))
        losses = {"importance": cv_squared(gates.sum(0)), "load": cv_squared(chance.sum(0))}
        return Routing(expert, self.scaled(weight), logits.softmax(-1), logits, losses)

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """See `Gate.weigh`; without noise."""
        weight = taken(routing.scores, expert)
        return self.scaled(normalised(weight) if self.top_k > 1 else weight)


def chosen_chance(logits: Tensor, noisy: Tensor, deviation: Tensor, k: int) -> Tensor:
    """P(x, i), [T, E]: the chance that expert i is among the k best, were its noise alone drawn again; k < E.

    It would have to beat the k-th best of the others: the (k+1)-th of all where i is chosen, else the k-th. An expert
    whose logit is -inf has no chance, and against a rival of -inf any other is sure to be chosen.
    """
    top = noisy.topk(k + 1).values
    last, next_one = top[:, k - 1 : k], top[:, k:]
    rival = torch.where(noisy > next_one, next_one, last)
    off, sure = logits.isneginf(), rival.isneginf()
    ahead = torch.where(off | sure, 0, rival) - torch.where(off | sure, 0, logits)  # infinities have no gradient
    chance = torch.erfc(ahead / (math.sqrt(2) * deviation)) / 2  # the normal CDF; ndtr keeps more for backward
    return torch.where(off, 0, torch.where(sure, 1, chance))
