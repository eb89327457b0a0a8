"""One expert per token, and equally many tokens per expert: an assignment in training, the best expert in eval."""

from __future__ import annotations

from torch import Tensor

from ..routing import Routing
from .assignment import assign
from .gate import Gate, taken


class BalancedGate(Gate):
    """In training the even assignment with the largest sum of logits (BASE, Lewis et al. 2021, arXiv:2103.16716).

    Every expert gets T / E of a rank's T tokens, rounded up or down, and no other even assignment has a larger sum
    (`assign`, exact; the paper's auction comes within a tolerance). It has no gradient and only makes the choice; the
    weight is the sigmoid of the chosen expert's logit. In eval each token takes its best expert. No balance loss.

    The assignment is over this rank's tokens, where the paper first shuffles them over all ranks, so that a rank's do
    not resemble each other: shuffle the data. In training a token's expert depends on the others, later ones too, in
    eval it does not. **The host computes it**: on a GPU every training forward waits; that of `SinkhornGate` does not.

    Args:
        dim, num_experts, scale, bias: see `Gate`.
    """

    balances_itself = True
    takes_mask = True

    def check_top_k(self, top_k: int) -> None:
        """See `Gate.check_top_k`."""
        super().check_top_k(top_k)
        if top_k != 1:
            raise ValueError(f"the base gate gives a token one expert; got top_k={top_k}, for more use 'sinkhorn'")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Route tokens x [T, D]; in training one where `mask`, bool [T], is False has no expert."""
        logits = self.logits(x)
        scores = logits.sigmoid()
        expert = (assign(logits, mask) if self.training else logits.argmax(1)).unsqueeze(1)
        weight = scores.gather(1, expert.clamp(min=0))
        return Routing(expert, self.scaled(weight), scores, logits).keep(expert >= 0)

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """See `Gate.weigh`."""
        return self.scaled(taken(routing.scores, expert))
