"""The transport that measured costs speak for, chosen with the first batch."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .base import Batch, SteppedDispatcher
from .flat import FlatDispatcher
from .hierarchical import HierarchicalDispatcher
from .measure import measure
from .mesh import EP, axis, node_and_local
from .node import NodeDispatcher
from .plan import Plan
from .profile import Message, Profile
from .steps import Steps

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AutoDispatcher(SteppedDispatcher):
    """Flat, 2DH or node-deduplicated: whichever `Profile.predict` says is fastest for the first dispatch.

    How many tokens a rank has is known only then. Ranks tell each other their largest number, once, all choose the
    same, and keep to it: later sizes do not change the choice. Assign the transport itself to `layer.dispatcher` to
    overrule it, or another AutoDispatcher to layers whose messages are quite different.

    Args:
        group: the W ranks that share the experts.
        transports: what to choose from, by the names of `Profile.predict`.
        profile: the same on all ranks.
    """

    group: ProcessGroup
    transports: dict[str, SteppedDispatcher]
    profile: Profile
    _chosen: list[str] = field(default_factory=list, init=False, repr=False, compare=False)  # filled once

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
    def chosen(self) -> str | None:
        """The transport in use; None before the first dispatch."""
        return self._chosen[0] if self._chosen else None

    def dispatch_steps(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        """As the chosen transport does it; the receipt says which that was."""
        transport = self._choose(x, plan.expert.shape[1], plan.counts.numel())
        batch = yield from transport.dispatch_steps(x, plan, weight)
        return batch._replace(receipt=(transport, batch.receipt))

    def combine_steps(self, rows: Tensor, receipt: Any) -> Steps[Tensor]:
        """By the way they came."""
        transport, receipt = receipt
        return transport.combine_steps(rows, receipt)

    def refuse_steps(self, num_experts: int, device: torch.device) -> Steps[None]:
        """Take part in the choice, if it is still to be made, and refuse then."""
        yield from self._choose(torch.empty(0, 0, device=device), 0, num_experts).refuse_steps(num_experts, device)

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """All ranks that share the experts."""
        return (self.group,)

    def _choose(self, x: Tensor, top_k: int, num_experts: int) -> SteppedDispatcher:
        if not self._chosen:
            largest = torch.tensor([len(x), x.shape[1] * x.element_size(), top_k], device=x.device)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
            message = Message(*largest.clamp(min=1).tolist(), num_experts=num_experts)  # 0 if nobody has any tokens
            self._chosen.append(self.profile.choose(message))
            if dist.get_rank(self.group) == 0:
                times = ", ".join(f"{name} {1e3 * t:.3g} ms" for name, t in self.profile.predict(message).items())
                log.info("dispatcher %s for %s; predicted, forward and backward: %s", self.chosen, message, times)
        return self.transports[self._chosen[0]]


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
            "make one with python -m turnout.dispatch.probe on as many"
        )
    return found
