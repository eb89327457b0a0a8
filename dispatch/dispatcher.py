"""Base classes of dispatchers, which bring tokens to the ranks of their experts (dispatch) and back (combine)."""

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
from .place import LayerCall, Place
from .plan import Plan
from .steps import Beside, Ready, Steps, announce_all, finish, refuse_all
from .torch_internals import mark_dynamic
from .traced import Sealed, outside


class Batch(NamedTuple):
    """Rows that the experts of this rank get from `Dispatcher.dispatch`.

    Attributes:
        rows: [R, D], tokens sorted by (local expert, source rank, row on that rank), in the dtype of the tokens.
        weight: [R], the router's weight of each row.
        counts: int64 [L], rows of each local expert. Rows past their sum are padding.
        receipt: what `combine` needs to bring the rows back. It is opaque and immutable, and may be used again.
    """

    rows: Tensor
    weight: Tensor
    counts: Tensor
    receipt: Any


Experts = Callable[..., Tensor]  # (rows [R, D], weight [R], counts [L]) -> rows [R, D] times their weights


class Dispatcher(ABC):
    """Moves rows to their experts and back. It knows nothing of router scores, experts or layers.

    A dispatcher is immutable and cheap, so `layer.dispatcher` may be assigned at any time. Everything that belongs to
    one batch is in its receipt, so several batches may be under way together. A new transport is one class with
    `dispatch` and `combine`. Derive it from `SteppedDispatcher` instead if its communication should overlap with
    compute.

    >>> plan = Plan.of(torch.tensor([[1, 0], [1, -1]]), num_experts=2)  # experts of two tokens
    >>> x, weight = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    >>> from turnout.dispatch import LocalDispatcher
    >>> dispatcher = LocalDispatcher()
    >>> batch = dispatcher.dispatch(x, plan, weight)
    >>> batch.counts.tolist(), batch.rows.tolist(), batch.weight.tolist()
    ([1, 2], [[1.0], [1.0], [2.0], [0.0]], [0.5, 0.5, 1.0, 0.0])
    >>> dispatcher.combine(batch.rows * batch.weight.unsqueeze(1), batch.receipt).tolist()  # experts that copy
    [[1.0], [2.0]]
    """

    @abstractmethod
    def dispatch(self, x: Tensor, plan: Plan, weight: Tensor) -> Batch:
        """Bring tokens to the ranks that own their experts.

        Args:
            x: [T, D], the tokens of this rank, floating.
            plan: the permutation of their assignments to experts.
            weight: [T, k], the router's weights, float32 or wider.

        Returns:
            Batch: the rows [R, D] of all ranks for the experts of this rank.

        Raises:
            ValueError: NaN among the weights, if this rank holds all experts (and its device is a CPU).
            DispatchError: ranks disagree, or NaN among the weights of a rank. Raised on every rank.
        """

    @abstractmethod
    def combine(self, rows: Tensor, receipt: Any) -> Tensor:
        """Bring rows back to the ranks of their tokens, and sum the rows of each token.

        Args:
            rows: [R, D], outputs of the experts, already multiplied by their weights.
            receipt: `Batch.receipt` of the dispatch that brought them.

        Returns:
            y [T, D], in the dtype of rows.
        """

    def __call__(self, x: Tensor, plan: Plan, weight: Tensor, experts: Experts, beside: Beside | None = None) -> Tensor:
        """Dispatch, experts and combine: x [T, D] -> y [T, D].

        Args:
            x, plan, weight: as in `dispatch`.
            experts: function (rows [R, D], weight [R], counts [L]) -> weighted rows [R, D].
            beside: computation that a dispatcher may run while rows travel, such as shared experts; None by default.
        """
        if torch.compiler.is_compiling() and not self.is_static(plan):
            batch = outside(self._dispatch_sealed, x, plan, weight)
            return outside(self._combine_sealed, experts(batch.rows, batch.weight, batch.counts), batch.receipt)
        plan = plan.started()
        batch = self._dispatch(x, plan, weight, beside)
        return self._combine(experts(batch.rows, batch.weight, batch.counts), batch.receipt, plan.call)

    def _dispatch(self, x: Tensor, plan: Plan, weight: Tensor, beside: Beside | None) -> Batch:
        """`dispatch`, with what may be computed beside it."""
        return self.dispatch(x, plan, weight)

    def _combine(self, rows: Tensor, receipt: Any, call: LayerCall | None) -> Tensor:
        """`combine`, with the forward that it belongs to."""
        return self.combine(rows, receipt)

    def _dispatch_sealed(self, x: Tensor, plan: Plan, weight: Tensor) -> Batch:
        """`dispatch` before compiled experts: they compile once for any number of rows and any receipt."""
        plan = plan.started()
        rows, weight, counts, receipt = self.dispatch(x, plan, weight)
        for tensor in (rows, weight):
            mark_dynamic(tensor, 0)
        return Batch(rows, weight, counts, Sealed((receipt, plan.call)))

    def _combine_sealed(self, rows: Tensor, receipt: Sealed) -> Tensor:
        return self._combine(rows, *receipt.content)

    def announce(self, x: Tensor, plan: Plan, weight: Tensor) -> Ready:
        """Agree with the other ranks on a forward, and stop before its rows travel.

        Ranks exchange what they exchange before rows leave, so that all of them hear of one that fails or disagrees.
        It serves forwards in which no rows travel (`WeightTravel`), and budgets of rows (`BoundedDispatcher`).

        Returns:
            Ready: the rows that this rank would hold. Here they are unknown.
        """
        self.dispatch(x, plan.without_rows(), weight)
        return Ready()

    def refuse(self, num_experts: int, device: torch.device, place: Place | None = None) -> None:  # noqa: B027
        """Tell the other ranks that this rank failed before its dispatch, so that none of them waits.

        Args:
            num_experts: number of experts E, on all ranks together.
            device: device of the tokens.
            place: the layer; None, the default, outside of `parallelize`.
        """

    def dispatch_steps(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        """`dispatch` as a generator (`turnout.dispatch.steps`). Here it is ready at once, and then runs as a whole."""
        yield Ready()
        return self.dispatch(x, plan, weight)

    def combine_steps(self, rows: Tensor, receipt: Any) -> Steps[Tensor]:
        """`combine` as a generator."""
        yield from ()
        return self.combine(rows, receipt)

    def refuse_steps(self, num_experts: int, device: torch.device) -> Steps[None]:
        """`refuse` as a generator. It has the steps of `dispatch_steps` before rows leave."""
        yield Ready()
        self.refuse(num_experts, device)

    def is_static(self, plan: Plan) -> bool:
        """Whether all shapes follow from the plan's shapes. `torch.compile` can then hold the exchange in its graph."""
        return False

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """Groups that the dispatcher communicates over. Together they connect all ranks that share the experts."""
        return ()

    def __deepcopy__(self, memo: dict) -> Dispatcher:
        return self  # immutable, and process groups cannot be copied


class SteppedDispatcher(Dispatcher):
    """A dispatcher written as generators: `dispatch_steps`, `combine_steps` and `refuse_steps`.

    A generator yields what it needs from other ranks or from the host, and is sent the answer. Before its
    ``yield Ready(...)`` a dispatch yields `Sizes` and `Read` alone, afterwards `Rows` alone. CONTRIBUTING.md has a
    complete example under "A transport".
    """

    def dispatch(self, x: Tensor, plan: Plan, weight: Tensor) -> Batch:
        """Bring tokens to the ranks that own their experts, as in `Dispatcher.dispatch`."""
        return self._dispatch(x, plan, weight, None)

    def _dispatch(self, x: Tensor, plan: Plan, weight: Tensor, beside: Beside | None) -> Batch:
        return finish(self.dispatch_steps(x, plan, weight), plan.call, beside)

    def announce(self, x: Tensor, plan: Plan, weight: Tensor) -> Ready:
        """Exchange notes and sizes, and stop where rows would leave."""
        (ready,) = announce_all([self.dispatch_steps(x, plan, weight)], plan.call)
        return ready

    def combine(self, rows: Tensor, receipt: Any) -> Tensor:
        """Bring rows back to their ranks and sum the rows of each token, as in `Dispatcher.combine`."""
        return finish(self.combine_steps(rows, receipt))

    def _combine(self, rows: Tensor, receipt: Any, call: LayerCall | None) -> Tensor:
        return finish(self.combine_steps(rows, receipt), call)

    def refuse(self, num_experts: int, device: torch.device, place: Place | None = None) -> None:
        """Send a refusal in place of sizes, as in `Dispatcher.refuse`. The other ranks raise DispatchError."""
        refuse_all([self.refuse_steps(num_experts, device)], None if place is None else place.start_call())

    @abstractmethod
    def dispatch_steps(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        """`dispatch` as a generator."""

    @abstractmethod
    def combine_steps(self, rows: Tensor, receipt: Any) -> Steps[Tensor]:
        """`combine` as a generator."""

    @abstractmethod
    def refuse_steps(self, num_experts: int, device: torch.device) -> Steps[None]:
        """`refuse` as a generator."""

    @property
    @abstractmethod
    def groups(self) -> tuple[ProcessGroup, ...]:
        """Groups that the dispatcher communicates over."""


class NodeLocalDispatcher(SteppedDispatcher):
    """Base of dispatchers with one group inside the node and one between nodes. Subclasses are dataclasses."""

    node: ProcessGroup  # ranks with this rank's local number, one in each node, in the order of nodes
    local: ProcessGroup  # ranks of this node

    @classmethod
    def of(cls, mesh: DeviceMesh, **options: Any) -> Self:
        """Make one for a mesh with axes "node" and "local". `options` are the other arguments of the dispatcher."""
        return cls(*node_and_local(mesh), **options)  # pyright: ignore[reportCallIssue]

    @property
    def shape(self) -> tuple[int, int]:
        """(number of nodes, ranks in each node)."""
        return dist.get_world_size(self.node), dist.get_world_size(self.local)

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """The group between nodes, and the group inside this node."""
        return self.node, self.local
