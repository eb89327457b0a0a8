"""Top-k gate: the k experts with the highest softmax scores."""

from __future__ import annotations

from torch import Tensor

from ..routing import Routing
from .gate import Gate, chosen_scores, jittered
from .router import check_groups, check_room, route_in_groups

ORDERS = ("softmax_first", "choose_first")


class TopKGate(Gate):
    """Top-k routing: each token visits the k experts with the highest softmax scores. It is the default gate.

    Args:
        dim, num_experts, top_k, scale, bias: see `Gate`; `top_k` is 2 by default.
        order: ``"softmax_first"``, the default, takes the softmax over all experts and then the k best scores.
            ``"choose_first"`` takes the k best logits and then the softmax over them, as Mixtral does.
        normalize: whether the k weights are divided by their sum. None, the default, does so for k > 1 only: a single
            weight would be the constant 1 and give the router no gradient. "choose_first" always does so.
        jitter: half-width of the multiplicative noise on the gate's input in training, uniform in
            [1 - jitter, 1 + jitter]; 0.0 by default.
        groups: number of expert groups G, a divisor of E; 1 by default. Group g is experts [g*E/G, (g+1)*E/G).
        top_groups: number of groups that a token may visit. It takes the groups with its highest scores
            (device-limited routing). None, the default, allows all.

    References:
        Shazeer et al. 2017, arXiv:1701.06538. Mixtral: arXiv:2401.04088. Device-limited routing: DeepSeek-V2,
        arXiv:2405.04434.
    """

    groups = top_groups = 1

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        order: str = "softmax_first",
        normalize: bool | None = None,
        jitter: float = 0.0,
        scale: float = 1.0,
        bias: bool = False,
        groups: int = 1,
        top_groups: int | None = None,
    ) -> None:
        super().__init__(dim, num_experts, top_k, scale, bias)
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
        # The softmax over the chosen logits equals their softmax over all, divided by their sum.
        self.order, self.normalize, self.jitter = order, True if order == "choose_first" else normalize, jitter
        self.groups, self.top_groups = groups, check_groups(num_experts, groups, top_groups)
        self.check_top_k(top_k)  # now that the groups are known

    def check_top_k(self, top_k: int) -> None:
        """See `Gate.check_top_k`. Here a token's groups must hold at least k experts."""
        super().check_top_k(top_k)
        check_room(top_k, self.num_experts, self.groups, self.top_groups)

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [T, D]. Scores are the softmax over all experts."""
        logits = self.logits(jittered(x, self.jitter) if self.training and self.jitter else x)
        normalize = self.top_k > 1 if self.normalize is None else self.normalize
        groups = self.groups, self.top_groups, 1  # a group is compared by its best expert
        expert, weight, scores = route_in_groups(logits, self.top_k, *groups, normalize=normalize)
        return Routing(expert, self.scaled(weight), scores, logits, normalized=True)

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """See `Gate.weigh`."""
        normalize = self.top_k > 1 if self.normalize is None else self.normalize
        return self.scaled(chosen_scores(routing.scores, expert, normalize))
