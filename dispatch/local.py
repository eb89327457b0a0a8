"""One rank holds all experts: nothing travels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .agreement import check_weight
from .dispatcher import Batch, Dispatcher, Experts
from .plan import Plan
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
        check_weight(weight)
        return experts(x, weight, plan.counts, plan)

    def is_static(self, plan: Plan) -> bool:
        """Always."""
        return True

    def dispatch(self, x: Tensor, plan: Plan, weight: Tensor) -> Batch:
        """Rows [R, D] with ``R = T * k``, or ``E * capacity`` when padded; NaN weights raise ValueError on a CPU."""
        check_weight(weight)
        return Batch(encode(x, plan), encode_weight(weight, plan), plan.counts, plan)

    def combine(self, rows: Tensor, receipt: Plan) -> Tensor:
        """Sum each token's rows [R, D] -> [T, D]."""
        return decode(rows, receipt)
