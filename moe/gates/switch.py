"""Switch gate: top-1 routing with input noise."""

from __future__ import annotations

from .topk import TopKGate


class SwitchGate(TopKGate):
    """Top-1 routing: each token visits its best expert, and the softmax score is the weight.

    Args:
        dim, num_experts, scale, bias: see `Gate`.
        top_k: must be 1.
        jitter: half-width of the multiplicative noise on the gate's input in training; 1e-2 by default, as in the
            paper.

    References:
        Switch Transformer: Fedus et al. 2021, arXiv:2101.03961.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 1,
        jitter: float = 1e-2,
        scale: float = 1.0,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, top_k, jitter=jitter, scale=scale, bias=bias)

    def check_top_k(self, top_k: int) -> None:
        """See `Gate.check_top_k`. Here k must be 1."""
        super().check_top_k(top_k)
        if top_k != 1:
            raise ValueError(f"the switch gate needs top_k=1; got top_k={top_k}: use gate='topk' for more experts")
