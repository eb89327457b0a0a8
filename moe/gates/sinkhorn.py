"""Top-k of balanced scores: an assignment in training, plain top-k in eval."""

from __future__ import annotations

from torch import Tensor

from ..routing import Routing
from .assignment import sinkhorn
from .gate import Gate, normalised, taken


class SinkhornGate(Gate):
    """In training the k best of scores balanced by Sinkhorn's iteration (S-BASE, Clark et al. 2022, arXiv:2202.01169).

    Rows and columns of exp(logits) are scaled in turn until every token has as much in all as another, and every
    expert as another: the transport plan with entropy, of which BASE's linear assignment (`BalancedGate`) is the sharp
    limit. It has no gradient and only makes the choice; weights are the softmax of the plain logits, normalised over
    the k if k > 1. Columns come last, so the plan's loads are equal; those of its best k nearly. In eval each token
    takes its own k best, as BASE has it.

    The plan is over this rank's tokens: in training a token's experts depend on the others, later ones too, in
    eval they do not. No balance loss is added.

    Args:
        dim, num_experts, top_k, scale, bias: see `Gate`.
        iterations: of the scaling, a fixed number: to ask whether it has converged would wait for the device.
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
            raise ValueError(f"iterations must be positive; got {iterations}")
        self.iterations = iterations

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route tokens x [T, D]; where `mask`, bool [T], is False, a token has no part in the plan."""
        logits = self.logits(x)
        scores = logits.softmax(-1)
        plan = sinkhorn(logits.detach(), self.iterations, mask) if self.training else logits.detach()
        expert = plan.topk(self.top_k).indices
        weight = scores.gather(1, expert)
        weight = normalised(weight) if self.top_k > 1 else weight
        return Routing(expert, self.scaled(weight), scores, logits)

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """See `Gate.weigh`."""
        weight = taken(routing.scores, expert)
        return self.scaled(normalised(weight) if self.top_k > 1 else weight)
