"""What a dispatcher is: it carries rows to their experts and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .mesh import node_and_local
from .place import Place, Visit
from .plan import Plan
from .steps import Ready, Steps, announce, finish, refuse
from .torch_internals import mark_dynamic
from .traced import Sealed, outside


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


Experts = Callable[..., Tensor]  # (rows, weight, counts) -> weighted rows [R, D]


class Dispatcher(ABC):
    """Carries rows to their experts and back; knows no scores, no experts, no layer.

    Dispatchers are immutable and cheap: assign another one to `layer.dispatcher` at any time. A trip's
    state is its receipt, so that two batches can be in flight. A new transport is one file with
    `dispatch` and `combine`, or with both in steps (`SteppedDispatcher`), so that others can interleave
    them with compute.
    """

    @abstractmethod
    def dispatch(self, x: Tensor, plan: Plan, weight: Tensor) -> Batch:
        """Take tokens x [T, D] and their weights [T, k] to the ranks that own the experts of `plan`."""

    @abstractmethod
    def combine(self, rows: Tensor, receipt: Any) -> Tensor:
        """Bring rows [R, D], weighted by the experts, home and sum them per token -> y [T, D]."""

    def __call__(self, x: Tensor, plan: Plan, weight: Tensor, experts: Experts) -> Tensor:
        """The whole trip: x [T, D] -> y [T, D]."""
        if torch.compiler.is_compiling() and not self.is_static(plan):
            batch = outside(self._dispatch_sealed, x, plan, weight)
            return outside(self._combine_sealed, experts(batch.rows, batch.weight, batch.counts), batch.receipt)
        plan = plan.visiting()
        batch = self.dispatch(x, plan, weight)
        return self._combine(experts(batch.rows, batch.weight, batch.counts), batch.receipt, plan.visit)

    def _combine(self, rows: Tensor, receipt: Any, visit: Visit | None) -> Tensor:
        """`combine` in the forward it belongs to."""
        return self.combine(rows, receipt)

    def _dispatch_sealed(self, x: Tensor, plan: Plan, weight: Tensor) -> Batch:
        """`dispatch` for experts that are compiled: once, for any number of rows and any receipt."""
        plan = plan.visiting()
        rows, weight, counts, receipt = self.dispatch(x, plan, weight)
        for tensor in (rows, weight):
            mark_dynamic(tensor, 0)
        return Batch(rows, weight, counts, Sealed((receipt, plan.visit)))

    def _combine_sealed(self, rows: Tensor, receipt: Sealed) -> Tensor:
        return self._combine(rows, *receipt.content)

    def announce(self, x: Tensor, plan: Plan, weight: Tensor) -> None:
        """Agree with the other ranks on a forward in which no rows travel: experts come here (`WeightTravel`).

        Ranks exchange what they exchange before rows leave, so that all of them hear of one that fails or disagrees.
        """
        self.dispatch(x, plan.without_rows(), weight)

    def refuse(self, num_experts: int, device: torch.device, place: Place | None = None) -> None:  # noqa: B027
        """Tell the other ranks that this one has failed before its dispatch, so that none waits for it."""

    def dispatch_steps(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        """`dispatch` as a trip in steps (`turnout.dispatch.steps`); one that has none is ready at once."""
        yield Ready()
        return self.dispatch(x, plan, weight)

    def combine_steps(self, rows: Tensor, receipt: Any) -> Steps[Tensor]:
        """`combine` as steps."""
        yield from ()
        return self.combine(rows, receipt)

    def refuse_steps(self, num_experts: int, device: torch.device) -> Steps[None]:
        """`refuse` as steps: those of `dispatch_steps` up to where rows would leave."""
        yield Ready()
        self.refuse(num_experts, device)

    def is_static(self, plan: Plan) -> bool:
        """Whether the shapes of a trip follow from those of its plan: `torch.compile` can then have it in its graph."""
        return False

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """The groups it exchanges over, which together join all ranks that share the experts."""
        return ()

    def __deepcopy__(self, memo: dict) -> Dispatcher:
        return self  # immutable, and process groups cannot be copied


class SteppedDispatcher(Dispatcher):
    """A dispatcher written as steps: `dispatch_steps`, `combine_steps` and `refuse_steps`.

    Up to its ``yield Ready(...)`` a dispatch asks for sizes and numbers alone, after it for rows alone.
    """

    def dispatch(self, x: Tensor, plan: Plan, weight: Tensor) -> Batch:
        """Rows [R, D] from all ranks for the experts of this one; raises DispatchError on every rank."""
        return finish(self.dispatch_steps(x, plan, weight), plan.visit)

    def announce(self, x: Tensor, plan: Plan, weight: Tensor) -> None:
        """Exchange notes and sizes, and stop where rows would leave."""
        announce([self.dispatch_steps(x, plan.without_rows(), weight)], plan.visit)

    def combine(self, rows: Tensor, receipt: Any) -> Tensor:
        """Rows [R, D] back by the way they came, summed per token -> [T, D]."""
        return finish(self.combine_steps(rows, receipt))

    def _combine(self, rows: Tensor, receipt: Any, visit: Visit | None) -> Tensor:
        return finish(self.combine_steps(rows, receipt), visit)

    def refuse(self, num_experts: int, device: torch.device, place: Place | None = None) -> None:
        """Send a note of refusal in place of sizes: the other ranks raise DispatchError."""
        refuse([self.refuse_steps(num_experts, device)], None if place is None else place.visit())

    @abstractmethod
    def dispatch_steps(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        """`dispatch` as steps."""

    @abstractmethod
    def combine_steps(self, rows: Tensor, receipt: Any) -> Steps[Tensor]:
        """`combine` as steps."""

    @abstractmethod
    def refuse_steps(self, num_experts: int, device: torch.device) -> Steps[None]:
        """`refuse` as steps."""

    @property
    @abstractmethod
    def groups(self) -> tuple[ProcessGroup, ...]:
        """The groups it exchanges over."""


class NodeLocalDispatcher(SteppedDispatcher):
    """A dispatcher in steps that goes inside nodes and between them, by a group of its own for each; a dataclass."""

    node: ProcessGroup  # the ranks with this one's place in their nodes, in the order of the nodes
    local: ProcessGroup  # the ranks of this node

    @classmethod
    def of(cls, mesh: DeviceMesh, **options: Any) -> Self:
        """Over the axes "node" and "local" of a mesh; `options` are the dispatcher's own."""
        return cls(*node_and_local(mesh), **options)  # pyright: ignore[reportCallIssue]

    @property
    def shape(self) -> tuple[int, int]:
        """(nodes, ranks in each)."""
        return dist.get_world_size(self.node), dist.get_world_size(self.local)

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """Between nodes, and inside this one."""
        return self.node, self.local
