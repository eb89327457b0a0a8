"""Sigmoid gate (DeepSeek-V3): top-k of sigmoid scores plus an expert bias, with group-limited routing."""

from __future__ import annotations

from torch import Tensor

from ..routing import Routing
from .biased import BiasedGate
from .gate import chosen_scores
from .router import check_groups, check_room, route_in_groups


class SigmoidGate(BiasedGate):
    """Top-k routing by sigmoid scores plus an expert bias, balanced without a loss (DeepSeek-V3).

    The expert bias decides the choice only, and weights are the sigmoids without it. It keeps loads even if
    `update_expert_biases(model)` is called once a step (`BiasedGate`).

    With groups, a token's experts come from `top_groups` groups. These are the groups whose best k / top_groups
    experts have the largest sum of scores, with the expert bias. Group g is experts [g*E/G, (g+1)*E/G). With one group
    on each node, this is node-limited routing.

    Args:
        dim, num_experts, top_k, scale, bias: see `Gate`; `top_k` is 2 by default.
        rate: step size of the expert bias; 1e-3 by default, 0 keeps the bias as it is.
        normalize: whether the k weights are divided by their sum; True by default.
        groups: number of expert groups G, a divisor of E; 1 by default.
        top_groups: number of groups that a token may visit. None, the default, allows all.
        balance_loss: whether the layer adds its load-balancing loss as well; False by default. The paper does, with
            ``balance=Balance(1e-4, over="sequence")``.

    References:
        DeepSeek-V3, arXiv:2412.19437.
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
        """See `Gate.check_top_k`. Here a token's groups must hold at least k experts."""
        super().check_top_k(top_k)
        check_room(top_k, self.num_experts, self.groups, self.top_groups)

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [T, D]. Scores are the sigmoids without the expert bias."""
        logits = self.logits(x)
        groups = self.groups, self.top_groups, max(self.top_k // self.top_groups, 1)
        options = "sigmoid", self.normalize, self.expert_bias
        expert, weight, scores = route_in_groups(logits, self.top_k, *groups, *options)
        return Routing(expert, self.scaled(weight), scores, logits)

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """See `Gate.weigh`."""
        return self.scaled(chosen_scores(routing.scores, expert, self.normalize))
