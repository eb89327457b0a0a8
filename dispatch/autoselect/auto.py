"""The transport and the number of chunks that measured costs speak for, chosen with the first batch."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..compressed import CompressedDispatcher
from ..dispatcher import Batch, Experts, SteppedDispatcher
from ..failure import named
from ..flat import FlatDispatcher
from ..hierarchical import HierarchicalDispatcher
from ..mesh import EP, axis, node_and_local
from ..node import NodeDispatcher
from ..overlap import OverlapDispatcher
from ..place import Place
from ..plan import Plan
from ..steps import Steps
from ..traced import Sealed, outside
from ..wire import Wire, row_bytes
from .measure import measure
from .profile import DEGREES, Choice, Message, Profile

log = logging.getLogger(__name__)


class _Receipt(NamedTuple):
    transport: SteppedDispatcher  # the one that carried the rows
    inner: Any  # its own receipt


@dataclass(frozen=True)
class AutoDispatcher(SteppedDispatcher):
    """Flat, 2DH or node-deduplicated, in 1, 2 or 4 chunks: what `Profile.choose` takes for the first dispatch.

    How many tokens a rank has is known only then. Ranks tell each other their largest number, once, all choose the
    same, and keep to it: later sizes do not change the choice. Assign the transport itself to `layer.dispatcher` to
    overrule it, or another AutoDispatcher to layers whose messages are quite different.

    Chunks overlap as in `OverlapDispatcher`, in whole trips; `dispatch` and `combine` by themselves are in one piece.

    Args:
        group: the W ranks that share the experts.
        transports: what to choose from, by the names of `Profile.predict`.
        profile: the same on all ranks.
        row_flops: operations of an expert for a row, forward; travel hides behind them. `parallelize` counts
            them (`Experts.row_flops`). 0: unknown, and then everything goes in one piece.
        degrees: numbers of chunks to choose from.
        wire: how rows travel (`CompressedDispatcher`); None: as they are.
    """

    group: ProcessGroup
    transports: dict[str, SteppedDispatcher]
    profile: Profile
    row_flops: float = 0.0
    degrees: tuple[int, ...] = DEGREES
    wire: Wire | None = None
    _choice: Sealed = field(default_factory=lambda: Sealed(None), init=False, repr=False, compare=False)  # filled once

    @classmethod
    def of(cls, mesh: DeviceMesh, profile: str | Path | Profile | None = None) -> AutoDispatcher:
        """Over the axes "node" and "local" of a mesh; measures now if no profile is given. A collective."""
        node, local = node_and_local(mesh)
        ep = axis(mesh, EP)
        assert ep is not None
        group = ep.get_group()
        found = agreed(profile, (dist.get_world_size(node), dist.get_world_size(local)), group)
        flat, by_node = FlatDispatcher(group), {"2dh": HierarchicalDispatcher.of(mesh), "node": NodeDispatcher.of(mesh)}
        return cls(group, {"flat": flat, **by_node}, measure(mesh) if found is None else found)

    @property
    def chosen(self) -> Choice | None:
        """The transport and the degree in use; None before the first dispatch."""
        return self._choice.content

    def __call__(self, x: Tensor, plan: Plan, weight: Tensor, experts: Experts) -> Tensor:
        """The whole trip, in as many chunks as chosen: x [T, D] -> y [T, D]."""
        if torch.compiler.is_compiling():
            return outside(self, x, plan, weight, experts)
        return self._in_chunks(x, plan.expert.shape[1], plan.counts.numel())(x, plan, weight, experts)

    def announce(self, x: Tensor, plan: Plan, weight: Tensor) -> None:
        """Take part in the choice, if it is still to be made, and announce every chunk then."""
        self._in_chunks(x, plan.expert.shape[1], plan.counts.numel()).announce(x, plan, weight)

    def refuse(self, num_experts: int, device: torch.device, place: Place | None = None) -> None:
        """Take part in the choice, if it is still to be made, and refuse every chunk then."""
        self._in_chunks(torch.empty(0, 0, device=device), 0, num_experts).refuse(num_experts, device, place)

    def dispatch_steps(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        """As the chosen transport does it; the receipt says which that was."""
        transport = self._transport(x, plan.expert.shape[1], plan.counts.numel())
        batch = yield from transport.dispatch_steps(x, plan, weight)
        return batch._replace(receipt=_Receipt(transport, batch.receipt))

    def combine_steps(self, rows: Tensor, receipt: _Receipt) -> Steps[Tensor]:
        """By the way they came."""
        return receipt.transport.combine_steps(rows, receipt.inner)

    def refuse_steps(self, num_experts: int, device: torch.device) -> Steps[None]:
        """Take part in the choice, if it is still to be made, and refuse then."""
        transport = self._transport(torch.empty(0, 0, device=device), 0, num_experts)
        yield from transport.refuse_steps(num_experts, device)

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """All ranks that share the experts."""
        return (self.group,)

    def _in_chunks(self, x: Tensor, top_k: int, num_experts: int) -> OverlapDispatcher:
        transport = self._transport(x, top_k, num_experts)
        return OverlapDispatcher(transport, self._choice.content.degree)

    def _transport(self, x: Tensor, top_k: int, num_experts: int) -> SteppedDispatcher:
        if self._choice.content is None:
            self._choice.content = self._choose(x, top_k, num_experts)
        transport = self.transports[self._choice.content.transport]
        return transport if self.wire is None else CompressedDispatcher(transport, self.wire)

    def _choose(self, x: Tensor, top_k: int, num_experts: int) -> Choice:
        number = x.element_size() if x.shape[1] else 0  # a refusal has no rows
        largest = torch.tensor([len(x), x.shape[1], number, top_k], device=x.device)
        with named("the choice of a transport", self.group):
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        tokens, dim, number, top_k = largest.clamp(min=1).tolist()  # 0 if nobody has any tokens
        row = row_bytes(dim, number, self.wire)
        message = Message(tokens, row, top_k, num_experts, self.row_flops, narrow=number <= 2)
        choice = self.profile.choose(message, self.degrees)
        if dist.get_rank(self.group) == 0:
            (name, degree), predicted = choice, {n: self.profile.predict(message, n) for n in self.degrees}
            times = "; ".join(
                f"in {n}: " + ", ".join(f"{which} {1e3 * t:.3g} ms" for which, t in seconds.items())
                for n, seconds in predicted.items()
            )
            log.info(
                "dispatcher %s, chunks: %d, for %s; predicted, forward and backward with the experts, by chunks: %s",
                *(name, degree, message, times),
            )
        return choice


def agreed(profile: str | Path | Profile | None, shape: tuple[int, int], group: ProcessGroup) -> Profile | None:
    """The profile that rank 0 of the group was given, on all ranks; None where it was given none.

    Only rank 0 reads a file, so that no two ranks can have read different ones; all raise if it cannot.
    """
    sent: list[Any] = [None]
    if dist.get_rank(group) == 0:
        try:
            sent = [profile if profile is None or isinstance(profile, Profile) else Profile.load(profile)]
        except (ValueError, OSError) as error:
            sent = [ValueError(str(error))]
    dist.broadcast_object_list(sent, group=group, group_src=0)
    (found,) = sent
    if isinstance(found, ValueError):
        raise found
    if found is not None and (found.nodes, found.locals) != shape:
        raise ValueError(
            f"the profile is of {found.nodes} nodes of {found.locals} ranks, the mesh has {shape[0]} of {shape[1]}; "
            "make one with python -m turnout.dispatch.autoselect.probe on as many"
        )
    return found
