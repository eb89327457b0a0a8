"""Dispatcher that chooses a transport and a number of chunks with its first batch, by measured costs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
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
from ..mesh import EP, NODE, axis, names, node_and_local
from ..node import PIECES, NodeDispatcher
from ..overlap import OverlapDispatcher
from ..place import Place
from ..plan import Plan
from ..steps import Beside, Ready, Steps
from ..traced import Sealed, outside
from ..wire import Wire, row_bytes
from .measure import measure
from .profile import DEGREES, Choice, Message, Profile

log = logging.getLogger(__name__)


class _Receipt(NamedTuple):
    transport: SteppedDispatcher  # the dispatcher that sent the rows
    inner: Any  # receipt of that dispatcher


@dataclass(frozen=True)
class AutoDispatcher(SteppedDispatcher):
    """Chooses flat, 2DH or node-deduplicated dispatch, in 1, 2 or 4 chunks, by `Profile.choose`.

    Node-deduplicated dispatch is two choices: in one piece, or in several (`NodeDispatcher.pieces`).

    It chooses with the first batch, because only then a rank knows its number of tokens. Ranks exchange their largest
    number once, so that all make the same choice, and they keep it: later batches do not change it. To overrule it,
    assign another dispatcher to `layer.dispatcher`; `turnout.moe.Adaptive` does so with `using`. Give layers whose
    messages differ much their own AutoDispatcher.

    A call of the dispatcher overlaps its chunks as `OverlapDispatcher` does. `dispatch` and `combine` run without
    chunks.

    Args:
        group: the W ranks that share the experts.
        transports: dispatchers to choose from, by their names in `Profile.predict`.
        profile: measured costs, the same on all ranks.
        row_flops: operations of one expert for one row in the forward, which can hide communication. `parallelize` sets
            it from `Experts.row_flops`. 0, the default, means unknown, and gives one chunk.
        degrees: numbers of chunks to choose from, (1, 2, 4) by default.
        wire: format in which rows are sent (`CompressedDispatcher`). None, the default, sends them as they are.

    Examples:
        ``parallelize(model, mesh, "auto")`` makes one on a mesh with axes "node" and "local". By hand::

            layer.dispatcher = AutoDispatcher.of(mesh, "profile.json")
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
        """Make one for a mesh with axes "node" and "local", or with "ep". Every rank must call it.

        Args:
            mesh: mesh with axes "node" and "local" in place of "ep". With "ep" the transport is flat, and only the
                number of chunks is chosen.
            profile: a `Profile`, or the path of one that `Profile.save` wrote. Only rank 0's is used. None, the
                default, measures the costs now, in about a second.

        Raises:
            ValueError: the mesh has other axes, or the profile cannot be read or belongs to another number of ranks.
        """
        ep = axis(mesh, EP)
        if ep is None:
            raise ValueError(f'the mesh needs axes "node" and "local", or "ep"; got axes {names(mesh)}')
        group = ep.get_group()
        transports: dict[str, SteppedDispatcher] = {"flat": FlatDispatcher(group)}
        shape = ep.size(), 1
        if NODE in names(mesh):
            node, local = node_and_local(mesh)
            shape = dist.get_world_size(node), dist.get_world_size(local)
            transports |= {
                "2dh": HierarchicalDispatcher.of(mesh),
                "node": NodeDispatcher.of(mesh),
                "node in pieces": NodeDispatcher.of(mesh, pieces=PIECES),
            }
        found = agreed(profile, shape, group)
        return cls(group, transports, measure(mesh) if found is None else found)

    def using(self, choice: Choice) -> AutoDispatcher:
        """A copy that uses this transport and number of chunks, and asks no other rank."""
        copied = replace(self)
        copied._choice.content = choice
        return copied

    @property
    def chosen(self) -> Choice | None:
        """The transport and the number of chunks in use; None before the first batch."""
        return self._choice.content

    def __call__(self, x: Tensor, plan: Plan, weight: Tensor, experts: Experts, beside: Beside | None = None) -> Tensor:
        """Dispatch, experts and combine in the chosen number of chunks: x [T, D] -> y [T, D]."""
        if torch.compiler.is_compiling():
            return outside(self, x, plan, weight, experts)
        return self._in_chunks(x, plan.expert.shape[1], plan.counts.numel())(x, plan, weight, experts, beside)

    def announce(self, x: Tensor, plan: Plan, weight: Tensor) -> Ready:
        """Take part in the choice, if it is still to be made, and announce every chunk then."""
        return self._in_chunks(x, plan.expert.shape[1], plan.counts.numel()).announce(x, plan, weight)

    def refuse(self, num_experts: int, device: torch.device, place: Place | None = None) -> None:
        """Take part in the choice if it is not made yet, then refuse every chunk."""
        self._in_chunks(torch.empty(0, 0, device=device), 0, num_experts).refuse(num_experts, device, place)

    def dispatch_steps(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        """Dispatch of the chosen transport. The receipt keeps which one it was."""
        transport = self._transport(x, plan.expert.shape[1], plan.counts.numel())
        batch = yield from transport.dispatch_steps(x, plan, weight)
        return batch._replace(receipt=_Receipt(transport, batch.receipt))

    def combine_steps(self, rows: Tensor, receipt: _Receipt) -> Steps[Tensor]:
        """Combine of the transport that sent the rows."""
        return receipt.transport.combine_steps(rows, receipt.inner)

    def refuse_steps(self, num_experts: int, device: torch.device) -> Steps[None]:
        """Take part in the choice if it is not made yet, then refuse."""
        transport = self._transport(torch.empty(0, 0, device=device), 0, num_experts)
        yield from transport.refuse_steps(num_experts, device)

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """The group of all ranks that share the experts, as a tuple."""
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
        number = x.element_size() if x.shape[1] else 0  # 0 on a rank that refuses, because its rows do not count
        largest = torch.tensor([len(x), x.shape[1], number, top_k], device=x.device)
        with named("the choice of a transport", self.group):
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        tokens, dim, number, top_k = largest.clamp(min=1).tolist()  # they are 0 if no rank has tokens
        row = row_bytes(dim, number, self.wire)
        message = Message(tokens, row, top_k, num_experts, self.row_flops, narrow=number <= 2)
        choice = self.profile.choose(message, self.degrees)
        if dist.get_rank(self.group) == 0:
            (name, degree), predicted = choice, {n: self.profile.predict(message, n) for n in self.degrees}
            times = "; ".join(
                f"in {n}: " + ", ".join(f"{which} {1e3 * seconds[which]:.3g} ms" for which in self.transports)
                for n, seconds in predicted.items()
            )
            log.info(
                "dispatcher %s, chunks: %d, for %s; predicted time of forward and backward by number of chunks: %s",
                *(name, degree, message, times),
            )
        return choice


def agreed(profile: str | Path | Profile | None, shape: tuple[int, int], group: ProcessGroup) -> Profile | None:
    """The profile that rank 0 of the group was given, on all ranks; None if rank 0 was given none.

    Only rank 0 reads a file, so that ranks cannot read different ones. If it cannot read the file, all ranks raise.

    Raises:
        ValueError: the file is no profile or cannot be read, or the profile is not for `shape` (nodes, ranks in each).
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
            f"profile is for {found.nodes} nodes of {found.locals} ranks, the mesh has {shape[0]} nodes of {shape[1]}; "
            "make one on this mesh: python -m turnout.dispatch.autoselect.probe"
        )
    return found
