"""What a dispatcher is: it carries rows to their experts and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .plan import Plan


class Batch(NamedTuple):
    """What the experts of this rank get.

    Attributes:
        rows: [R, D], sorted by (local expert, source rank, source row).
        weight: [R], the gate's weight of each row.
        counts: int64 [L], rows per local expert; rows past their sum belong to nobody.
        receipt: the way back: opaque, immutable, good for more than one return.
    """

    rows: Tensor
    weight: Tensor
    counts: Tensor
    receipt: Any


Experts = Callable[[Tensor, Tensor, Tensor], Tensor]  # (rows, weight, counts) -> weighted rows [R, D]


class Dispatcher(ABC):
    """Carries rows to their experts and back; knows no scores, no experts, no layer.

    Dispatchers are immutable and cheap: assign another one to `layer.dispatcher` at any time. A trip's
    state is its receipt, so that two batches can be in flight. A new transport is one file with
    `dispatch` and `combine`; one that interleaves travel and compute overrides `__call__`.
    """

    @abstractmethod
    def dispatch(self, x: Tensor, plan: Plan, weight: Tensor) -> Batch:
        """Take tokens x [T, D] and their weights [T, k] to the ranks that own the experts of `plan`."""

    @abstractmethod
    def combine(self, rows: Tensor, receipt: Any) -> Tensor:
        """Bring rows [R, D], weighted by the experts, home and sum them per token -> y [T, D]."""

    def __call__(self, x: Tensor, plan: Plan, weight: Tensor, experts: Experts) -> Tensor:
        """The whole trip: x [T, D] -> y [T, D]."""
        batch = self.dispatch(x, plan, weight)
        return self.combine(experts(batch.rows, batch.weight, batch.counts), batch.receipt)

    def refuse(self, num_experts: int, device: torch.device) -> None:  # noqa: B027
        """Tell the other ranks that this one has failed before its dispatch, so that none waits for it."""

    def __deepcopy__(self, memo: dict) -> Dispatcher:
        return self  # immutable, and process groups cannot be copied
