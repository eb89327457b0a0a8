"""Dispatcher that sends the rows of another dispatcher in bfloat16 or float8."""

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
    """Sends the rows of another dispatcher in bfloat16 or float8.

    Rows are compressed before each exchange, in dispatch and in combine, and have their own dtype again after it. So
    experts and sums compute as before. Gradients are sent in bfloat16 with either format, and treat the rounding as the
    identity. Weights, sizes and expert ids are sent as they are. `wire.pack` describes the formats and their errors.

    To overlap as well, wrap this dispatcher: ``OverlapDispatcher(CompressedDispatcher(inner), 2)``.

    Args:
        inner: the dispatcher that sends the rows.
        wire: format of the rows, the same on all ranks, which is not checked. ``"bf16"``, the default, or ``"fp8"``,
            which is e4m3 with one scale for each row.

    Raises:
        TypeError: `inner` is no `SteppedDispatcher`.
        ValueError: `wire` is none of the two formats.

    Examples:
        On the ranks of a mesh with axis "ep"::

            layer.dispatcher = CompressedDispatcher(FlatDispatcher(mesh.get_group("ep")), wire="fp8")
    """

    inner: SteppedDispatcher
    wire: Wire = "bf16"

    def __post_init__(self) -> None:
        if not isinstance(self.inner, SteppedDispatcher):
            raise TypeError(
                f"inner must be a SteppedDispatcher, whose rows can be compressed; got {type(self.inner).__name__}. "
                "To overlap as well, write OverlapDispatcher(CompressedDispatcher(inner), degree)"
            )
        if self.wire not in WIRES:
            raise ValueError(f"wire must be one of {', '.join(WIRES)}; got {self.wire!r}")

    def dispatch_steps(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        """Dispatch of `inner` with compressed rows."""
        return self._compressed(self.inner.dispatch_steps(x, plan, weight))

    def combine_steps(self, rows: Tensor, receipt: Any) -> Steps[Tensor]:
        """Combine of `inner` with compressed rows."""
        return self._compressed(self.inner.combine_steps(rows, receipt))

    def is_static(self, plan: Plan) -> bool:
        """As for `inner`, with torch 2.13 or newer; False before."""
        return KEEPS_BACKWARDS and self.inner.is_static(plan)

    def refuse_steps(self, num_experts: int, device: torch.device) -> Steps[None]:
        """Refuse as `inner` does."""
        return self.inner.refuse_steps(num_experts, device)

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """The groups of `inner`."""
        return self.inner.groups

    def _compressed(self, steps: Steps[Result]) -> Steps[Result]:
        answer = None
        while True:
            try:
                ask = steps.send(answer)
            except StopIteration as end:
                return returned(end)
            answer = yield ask._replace(wire=self.wire) if isinstance(ask, Rows) else ask
