"""BASE gate: a balanced assignment of tokens to experts in training, top-1 in eval mode."""

from __future__ import annotations

from torch import Tensor

from ..routing import Routing
from .assignment import assign
from .gate import Gate, chosen_scores


class BalancedGate(Gate):
    """In training, the balanced assignment of tokens to experts with the largest sum of logits; top-1 in eval mode.

    Every expert gets T / E of a rank's T tokens, rounded up or down. The assignment is exact (`assign`), where the
    paper's auction is within a tolerance. It has no gradient and only makes the choice. The weight is the sigmoid of
    the chosen expert's logit. The layer adds no load-balancing loss.

    The assignment is over the tokens of this rank. The paper first shuffles tokens over all ranks, because tokens of
    one rank resemble each other; here, shuffle the data. In training the gate is not causal: a token's expert depends
    on all tokens of the rank. **The CPU computes it**, so on a GPU every training forward waits. `SinkhornGate` does
    not wait.

    Args:
        dim, num_experts, scale, bias: see `Gate`.
        top_k: must be 1.

    References:
        BASE layers: Lewis et al. 2021, arXiv:2103.16716.
    """

    balances_itself = True
    takes_mask = True

    def check_top_k(self, top_k: int) -> None:
        """See `Gate.check_top_k`. Here k must be 1."""
        super().check_top_k(top_k)
        if top_k != 1:
            raise ValueError(f"the base gate needs top_k=1; got top_k={top_k}: use gate='sinkhorn' for more experts")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route tokens x [T, D]. In training, tokens where `mask`, bool [T], is False get no expert."""
        logits = self.logits(x)
        scores = logits.sigmoid()
        expert = (assign(logits, mask) if self.training else logits.argmax(1)).unsqueeze(1)
        weight = scores.gather(1, expert.clamp(min=0))
        return Routing(expert, self.scaled(weight), scores, logits).keep(expert >= 0)

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """See `Gate.weigh`."""
        return self.scaled(chosen_scores(routing.scores, expert))
