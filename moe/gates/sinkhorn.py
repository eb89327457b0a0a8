"""Sinkhorn gate: top-k of scores balanced by Sinkhorn's iteration in training, plain top-k in eval mode."""

from __future__ import annotations

from torch import Tensor

from ..routing import Routing
from .assignment import sinkhorn
from .gate import Gate, chosen_scores, normalised


class SinkhornGate(Gate):
    """In training, the k best of scores balanced by Sinkhorn's iteration; plain top-k in eval mode.

    Rows and columns of exp(logits) are scaled in turn until all tokens have nearly equal sums, and all experts equal
    sums. The result is an entropy-regularised transport plan. Its limit without entropy is the assignment of
    `BalancedGate`. The plan has no gradient and only makes the choice, and the loads of its top-k are nearly even.
    Weights are the softmax of the plain logits, divided by their sum if k > 1. The layer adds no load-balancing loss.

    The plan is over the tokens of this rank. So in training the gate is not causal: a token's experts depend on all
    tokens of the rank.

    Args:
        dim, num_experts, top_k, scale, bias: see `Gate`; `top_k` is 1 by default.
        iterations: number of iterations; 8 by default. It is fixed because a test of convergence would wait for the
            device.

    References:
        S-BASE: Clark et al. 2022, arXiv:2202.01169.
    """

    balances_itself = True
    takes_mask = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 1,
        iterations: int = 8,
        scale: float = 1.0,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, top_k, scale, bias)
        if iterations < 1:
            raise ValueError(f"iterations must be a positive integer; got {iterations}")
        self.iterations = iterations

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route tokens x [T, D]. Tokens where `mask`, bool [T], is False do not count in the plan."""
        logits = self.logits(x)
        scores = logits.softmax(-1)
        plan = sinkhorn(logits.detach(), self.iterations, mask) if self.training else logits.detach()
        expert = plan.topk(self.top_k).indices
        weight = scores.gather(1, expert)
        weight = normalised(weight) if self.top_k > 1 else weight
        return Routing(expert, self.scaled(weight), scores, logits, normalized=True)

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """See `Gate.weigh`."""
        return self.scaled(chosen_scores(routing.scores, expert, self.top_k > 1))
