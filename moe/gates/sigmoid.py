"""Sigmoid scores, balanced by a bias on the choice; groups of experts first, if there are any."""

from __future__ import annotations

from torch import Tensor

from ..routing import Routing
from .biased import BiasedGate
from .gate import normalised, taken
from .router import check_groups, check_room, route_in_groups


class SigmoidGate(BiasedGate):
    """The k experts of highest sigmoid(x W) + bias; the weight is without the bias (DeepSeek-V3, arXiv:2412.19437).

    The bias keeps loads even without an auxiliary loss, if `update_expert_biases(model)` is called once a step
    (`BiasedGate`).

    With groups, a token's experts come from `top_groups` of them: those whose k / top_groups best experts, with
    bias, have the largest sum. Group g is experts [g*E/G, (g+1)*E/G): G nodes make it "node-limited".

    Args:
        dim, num_experts, top_k, scale, bias: see `Gate`.
        rate: the bias's step; 0 leaves it as it is.
        normalize: divide the k weights by their sum.
        groups, top_groups: G, a divisor of E, and how many of them a token may go to; None: all.
        balance_loss: let the layer add its balance loss, as the paper does with
            ``balance=Balance(1e-4, over="sequence")``.
    """

    groups = top_groups = 1

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
        bias: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, top_k, rate, scale, bias)
        self.normalize, self.balances_itself = normalize, not balance_loss
        self.groups, self.top_groups = groups, check_groups(num_experts, groups, top_groups)
        self.check_top_k(top_k)  # now that the groups are known

    def check_top_k(self, top_k: int) -> None:
        """See `Gate.check_top_k`: there must be as many experts in the groups of a token."""
        super().check_top_k(top_k)
        check_room(top_k, self.num_experts, self.groups, self.top_groups)

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [T, D]; scores are the sigmoids, without the bias on the choice."""
        logits = self.logits(x)
        groups = self.groups, self.top_groups, max(self.top_k // self.top_groups, 1)
        options = "sigmoid", self.normalize, self.expert_bias
        expert, weight, scores = route_in_groups(logits, self.top_k, *groups, *options)
        return Routing(expert, self.scaled(weight), scores, logits)

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """See `Gate.weigh`."""
        weight = taken(routing.scores, expert)
        return self.scaled(normalised(weight) if self.normalize else weight)
