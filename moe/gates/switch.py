"""One expert per token."""

from __future__ import annotations

from .topk import TopKGate


class SwitchGate(TopKGate):
    """The best expert alone, its weight the softmax score itself (Switch Transformer, arXiv:2101.03961).

    Args:
        dim, num_experts, scale, bias: see `Gate`.
        jitter: multiplicative input noise in training; the paper's is 1e-2.
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
        """See `Gate.check_top_k`."""
        super().check_top_k(top_k)
        if top_k != 1:
            raise ValueError(f"the switch gate picks one expert a token; got top_k={top_k}, for more use 'topk'")
