"""One rank holds all experts: nothing travels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .agreement import NAN_MESSAGE
from .dispatcher import Batch, Dispatcher, Experts
from .plan import Plan, Tokens
from .reorder import decode, encode, encode_weight


@dataclass(frozen=True)
class LocalDispatcher(Dispatcher):
    """Encode, experts, decode. No collective and no host sync.

    Experts that gather (`Experts.gathers`) read the tokens by the plan instead, and weigh and sum up what they make.
    """

    def __call__(self, x: Tensor, plan: Plan, weight: Tensor, experts: Experts) -> Tensor:
        """The whole trip: x [T, D] -> y [T, D]."""
        if not getattr(experts, "gathers", False):
            return super().__call__(x, plan, weight, experts)
        _check_weight(weight)
        return experts(Tokens(x, plan), weight, plan.counts)

    def is_static(self, plan: Plan) -> bool:
        """Always."""
        return True

    def dispatch(self, x: Tensor, plan: Plan, weight: Tensor) -> Batch:
        """Rows [R, D] with ``R = T * k``, or ``E * capacity`` when padded; NaN weights raise ValueError on a CPU."""
        _check_weight(weight)
        return Batch(encode(x, plan), encode_weight(weight, plan), plan.counts, plan)

    def combine(self, rows: Tensor, receipt: Plan) -> Tensor:
        """Sum each token's rows [R, D] -> [T, D]."""
        return decode(rows, receipt)


def _check_weight(weight: Tensor) -> None:
    """Raise ValueError on NaN weights where looking is free: on a CPU, eagerly. Elsewhere `MoE.stats` tells."""
    if weight.device.type == "cpu" and not torch.compiler.is_compiling() and bool(weight.isnan().any()):
        raise ValueError(f"the gate produced {NAN_MESSAGE}")
