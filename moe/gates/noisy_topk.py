"""Noisy top-k gate: logits with learned noise, balanced by the importance and load losses."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import cv_squared
from ..routing import Routing
from .gate import Gate, chosen_scores, projected, topk_softmax


class NoisyTopKGate(Gate):
    """Noisy top-k routing: in training, normal noise with a learned scale is added to the logits.

    The noise of a token and expert has standard deviation softplus(x W_noise) + noise_floor. Weights are the softmax
    over the k chosen logits. For k = 1 it is over all, because one weight alone would be the constant 1 and have no
    gradient.

    The paper's two losses replace the load-balancing loss, over the tokens of this rank. "importance" is CV^2 of the
    experts' sums of weights. "load" is CV^2 of the experts' expected numbers of tokens. Without noise, or if k = E,
    tokens are counted instead, and the load loss has no gradient.

    Both matrices start at zero, as in the paper. So at first noise alone decides, and loads are even. In eval mode, an
    untrained gate sends all tokens to the same k experts.

    Args:
        dim, num_experts, top_k, scale, bias: see `Gate`; `top_k` is 2 by default.
        noise_floor: smallest standard deviation of the noise, positive; 1e-2 by default, as in the paper's code.

    References:
        Shazeer et al. 2017, arXiv:1701.06538, eq. 3-5 and appendix A.
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
            raise ValueError(f"noise_floor must be positive, because load divides by the noise; got {noise_floor}")
        self.noise_floor = noise_floor
        self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))

    def reset_parameters(self) -> None:
        """Initialise both matrices and the bias with zeros."""
        for p in self.parameters(recurse=False):
            nn.init.zeros_(p)
        self._reset_adapter()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route tokens x [T, D]. Scores have no noise, and losses skip tokens where `mask`, bool [T], is False."""
        logits = noisy = self.logits(x)
        deviation = None
        if self.training:
            deviation = F.softplus(projected(x, self.noise_weight)) + self.noise_floor
            noisy = logits + deviation * torch.randn_like(logits)
        weight, expert = topk_softmax(noisy, self.top_k)
        gates = torch.zeros_like(logits).scatter(1, expert, weight)
        if deviation is None or self.top_k == self.num_experts:
            chance = torch.zeros_like(logits).scatter(1, expert, 1.0)
        else:
            chance = chosen_chance(logits, noisy, deviation, self.top_k)
        if mask is not None:
            gates, chance = (torch.where(mask.unsqueeze(1), each, 0) for each in (gates, chance))
        losses = {"importance": cv_squared(gates.sum(0)), "load": cv_squared(chance.sum(0))}
        return Routing(expert, self.scaled(weight), logits.softmax(-1), logits, losses, normalized=True)

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """See `Gate.weigh`. Weights have no noise."""
        return self.scaled(chosen_scores(routing.scores, expert, self.top_k > 1))


def chosen_chance(logits: Tensor, noisy: Tensor, deviation: Tensor, k: int) -> Tensor:
    """Probability P(x, i) that expert i is among the k best if only its noise is drawn again: [T, E], for k < E.

    The expert must then beat the k-th best of the others: the (k+1)-th of all if it is chosen now, and the k-th if
    not. It is 0 for a logit of -inf, and 1 against a rival of -inf.
    """
    top = noisy.topk(k + 1).values
    last, next_one = top[:, k - 1 : k], top[:, k:]
    rival = torch.where(noisy > next_one, next_one, last)
    off, sure = logits.isneginf(), rival.isneginf()
    ahead = torch.where(off | sure, 0, rival) - torch.where(off | sure, 0, logits)  # inf would give NaN gradients
    chance = torch.erfc(ahead / (math.sqrt(2) * deviation)) / 2  # normal CDF; ndtr would save more for backward
    return torch.where(off, 0, torch.where(sure, 1, chance))
