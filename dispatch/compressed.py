"""Rows that travel in fewer bytes than the experts compute in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .dispatcher import Batch, SteppedDispatcher
from .plan import Plan
from .steps import Result, Rows, Steps, returned
from .traced import KEEPS_BACKWARDS
from .wire import WIRES, Wire


@dataclass(frozen=True)
class CompressedDispatcher(SteppedDispatcher):
    """Another dispatcher's trips, their rows in bfloat16 or float8 while they are under way.

    Rows are compressed before every exchange, out and home, and are in their own dtype again after it:
    experts and sums compute as before. Gradients travel in bfloat16 with either format, as if nothing had been
    rounded on the way. Weights, sizes and numbers of experts travel as they are. See `wire.pack` for the
    formats and their errors. Where it overlaps, too: ``OverlapDispatcher(CompressedDispatcher(inner), 2)``.

    Args:
        inner: what carries the rows, a dispatcher in steps.
        wire: ``"bf16"``, or ``"fp8"``: e4m3 with a scale for each row. The same on all ranks; it is not checked.
    """

    inner: SteppedDispatcher
    wire: Wire = "bf16"

    def __post_init__(self) -> None:
        if not isinstance(self.inner, SteppedDispatcher):
            raise TypeError(
                f"inner must be a SteppedDispatcher, whose rows can be reached; got {type(self.inner).__name__}"
                " (wrap this one in an OverlapDispatcher, not the other way round)"
            )
        if self.wire not in WIRES:
            raise ValueError(f"wire must be one of {', '.join(WIRES)}; got {self.wire!r}")

    def dispatch_steps(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        """As `inner`, with smaller rows."""
        return self._compressed(self.inner.dispatch_steps(x, plan, weight))

    def combine_steps(self, rows: Tensor, receipt: Any) -> Steps[Tensor]:
        """As `inner`, with smaller rows."""
        return self._compressed(self.inner.combine_steps(rows, receipt))

    def is_static(self, plan: Plan) -> bool:
        """As `inner`, from torch 2.13 on."""
        return KEEPS_BACKWARDS and self.inner.is_static(plan)

    def refuse_steps(self, num_experts: int, device: torch.device) -> Steps[None]:
        """As `inner`."""
        return self.inner.refuse_steps(num_experts, device)

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """Those of `inner`."""
        return self.inner.groups

    def _compressed(self, steps: Steps[Result]) -> Steps[Result]:
        answer = None
        while True:
            try:
                ask = steps.send(answer)
            except StopIteration as end:
                return returned(end)
            answer = yield ask._replace(wire=self.wire) if isinstance(ask, Rows) else ask
