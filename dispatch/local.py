"""Dispatch on one rank that holds all experts: permute and unpermute, without communication."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .agreement import NAN_MESSAGE
from .dispatcher import Batch, Dispatcher, Experts
from .plan import Plan, Tokens
from .reorder import decode, encode, encode_weight
from .steps import Beside, Ready


@dataclass(frozen=True)
class LocalDispatcher(Dispatcher):
    """Permutes tokens by expert and back on one rank. There is no collective and no host sync.

    Experts that gather (`Experts.gathers`) get the tokens and the plan in place of rows. They index the tokens
    themselves, multiply by the weights and sum each token's rows.

    >>> plan = Plan.of(torch.tensor([[1], [0], [-1]]), num_experts=2)  # the third token is dropped
    >>> batch = LocalDispatcher().dispatch(torch.tensor([[1.0], [2.0], [3.0]]), plan, torch.ones(3, 1))
    >>> batch.rows.tolist(), batch.counts.tolist()
    ([[2.0], [1.0], [0.0]], [1, 1])
    >>> LocalDispatcher().combine(batch.rows, batch.receipt).tolist()
    [[1.0], [2.0], [0.0]]
    """

    def __call__(self, x: Tensor, plan: Plan, weight: Tensor, experts: Experts, beside: Beside | None = None) -> Tensor:
        """Permute, experts, unpermute: x [T, D] -> y [T, D]. Nothing travels, so nothing runs beside it."""
        if not getattr(experts, "gathers", False):
            return super().__call__(x, plan, weight, experts)
        _check_weight(weight)
        return experts(Tokens(x, plan), weight, plan.counts)

    def announce(self, x: Tensor, plan: Plan, weight: Tensor) -> Ready:
        """The rows of the plan. There is nobody to agree with."""
        return Ready(plan.counts, plan.token.shape[0])

    def is_static(self, plan: Plan) -> bool:
        """Always True."""
        return True

    def dispatch(self, x: Tensor, plan: Plan, weight: Tensor) -> Batch:
        """Permute tokens by expert: R is ``T * k``, or ``E * capacity`` if the plan is padded.

        Raises:
            ValueError: NaN among the weights, on a CPU and outside of `torch.compile`.
        """
        _check_weight(weight)
        return Batch(encode(x, plan), encode_weight(weight, plan), plan.counts, plan)

    def combine(self, rows: Tensor, receipt: Plan) -> Tensor:
        """Sum each token's rows [R, D] -> [T, D]."""
        return decode(rows, receipt)


def _check_weight(weight: Tensor) -> None:
    """Raise ValueError on NaN weights on a CPU, where the check is free. Elsewhere `MoE.stats` counts them."""
    if weight.device.type == "cpu" and not torch.compiler.is_compiling() and bool(weight.isnan().any()):
        raise ValueError(f"the gate produced {NAN_MESSAGE}")
