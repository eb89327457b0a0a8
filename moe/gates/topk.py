"""Softmax over the experts, the k best ones."""

from __future__ import annotations

from torch import Tensor

from ..routing import Routing
from .base import Gate, jittered
from .router import route

ORDERS = ("softmax_first", "choose_first")


class TopKGate(Gate):
    """The k experts of highest score (Shazeer et al. 2017, arXiv:1701.06538).

    Args:
        dim, num_experts, top_k, scale: see `Gate`.
        order: ``"softmax_first"``: softmax over all experts, then the k best. ``"choose_first"``: the k
            best logits, then softmax over those (Mixtral, arXiv:2401.04088).
        normalize: divide the k weights by their sum; None: for k > 1 only. With k = 1 the weight would
            be the constant 1, and the router would get no gradient; so would "choose_first".
        jitter: multiplicative input noise in training, within [1 - jitter, 1 + jitter].
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        order: str = "softmax_first",
        normalize: bool | None = None,
        jitter: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__(dim, num_experts, top_k, scale)
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
        self.order, self.normalize, self.jitter = order, normalize, jitter

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [T, D]; scores are the softmax over all experts."""
        logits = self.logits(jittered(x, self.jitter) if self.training and self.jitter else x)
        normalize = self.top_k > 1 if self.normalize is None else self.normalize
        # softmax over the chosen is their part of the softmax over all, normalised
        expert, weight, scores = route(logits, self.top_k, normalize=normalize or self.order == "choose_first")
        return Routing(expert, self.scaled(weight), scores, logits)
