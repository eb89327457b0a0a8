"""Softmax over the experts, the k best ones."""

from __future__ import annotations

from torch import Tensor

from ..routing import Routing
from .gate import Gate, jittered, normalised, taken
from .router import check_groups, check_room, route_in_groups

ORDERS = ("softmax_first", "choose_first")


class TopKGate(Gate):
    """The k experts of highest score (Shazeer et al. 2017, arXiv:1701.06538).

    Args:
        dim, num_experts, top_k, scale, bias: see `Gate`.
        order: ``"softmax_first"``: softmax over all experts, then the k best. ``"choose_first"``: the k
            best logits, then softmax over those (Mixtral, arXiv:2401.04088).
        normalize: divide the k weights by their sum; None: for k > 1 only. With k = 1 the weight would
            be the constant 1, and the router would get no gradient; so would "choose_first".
        jitter: multiplicative input noise in training, within [1 - jitter, 1 + jitter].
        groups, top_groups: G, a divisor of E, and how many of them a token may go to, those of its highest scores
            (DeepSeek-V2's device-limited routing, arXiv:2405.04434); None: all. Group g is experts [g*E/G, (g+1)*E/G).
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
        # Softmax over the chosen is their part of the softmax over all.
        self.order, self.normalize, self.jitter = order, True if order == "choose_first" else normalize, jitter
        self.groups, self.top_groups = groups, check_groups(num_experts, groups, top_groups)
        self.check_top_k(top_k)  # now that the groups are known

    def check_top_k(self, top_k: int) -> None:
        """See `Gate.check_top_k`: there must be as many experts in the groups of a token."""
        super().check_top_k(top_k)
        check_room(top_k, self.num_experts, self.groups, self.top_groups)

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [T, D]; scores are the softmax over all experts."""
        logits = self.logits(jittered(x, self.jitter) if self.training and self.jitter else x)
        normalize = self.top_k > 1 if self.normalize is None else self.normalize
        groups = self.groups, self.top_groups, 1  # a group is as good as its best expert
        expert, weight, scores = route_in_groups(logits, self.top_k, *groups, normalize=normalize)
        return Routing(expert, self.scaled(weight), scores, logits)

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """See `Gate.weigh`."""
        weight = taken(routing.scores, expert)
        normalize = self.top_k > 1 if self.normalize is None else self.normalize
        return self.scaled(normalised(weight) if normalize else weight)
