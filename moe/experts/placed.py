"""Experts in another order than that of their global ids: which rank owns which, and how rows of tensors change ranks.

Slot s of a stacked tensor lies on rank s // (E / W) of the expert group. Without a placement, expert e is in slot e.
`place_experts` sets a `Placement`. State dicts keep the order of global ids, so they are reordered on their way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ...dispatch.failure import named
from .sharded import local, take_parts

STATE_DICT = "a state dict of experts"  # what is exchanged, for errors


@dataclass(frozen=True, eq=False)
class Placement:
    """Which expert lies in which slot.

    Attributes:
        order: global id of the expert in each slot, E ids.
        group: ranks that hold other experts, in the order of their slots.
        slots: slot of each expert, E numbers: the inverse of `order`.
    """

    order: tuple[int, ...]
    group: ProcessGroup
    slots: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        slots = sorted(range(len(self.order)), key=self.order.__getitem__)
        object.__setattr__(self, "slots", tuple(slots))

    def to_global(self, tensors: dict[str, Any], what: str, fault: Exception | None = None) -> dict[str, Any]:
        """Copies of stacked DTensors with experts in the order of their ids. All ranks of the group call it.

        A `fault` that this rank has found makes every rank raise.
        """
        return self._reordered(tensors, self.order, range(len(self.order)), what, fault)

    def to_slots(self, tensors: dict[str, Any], what: str, fault: Exception | None = None) -> dict[str, Any]:
        """The reverse of `to_global`."""
        return self._reordered(tensors, range(len(self.order)), self.order, what, fault)

    def _reordered(
        self,
        tensors: dict[str, Any],
        before: Sequence[int],
        after: Sequence[int],
        what: str,
        fault: Exception | None,
    ) -> dict[str, Any]:
        check_alike(sizes_of(tensors), fault, self.group, what)
        with torch.no_grad():
            copies = {name: t.detach().clone() for name, t in tensors.items()}
            exchange([local(t) for t in copies.values()], before, after, self.group)
        return copies

    def __deepcopy__(self, memo: dict[int, Any]) -> Placement:
        return self  # immutable, and process groups cannot be copied


class PlacedCopies:
    """Where copies of the tensors of experts lie: in the slots that the experts had when they were last followed."""

    def __init__(self, experts: Any) -> None:
        self.experts = experts
        self.placement: Placement | None = experts.placement

    def follow(self, copies: Sequence[Tensor]) -> None:
        """Move copies, in place, to where `place_experts` has moved the experts. All ranks call it."""
        before, now = self.placement, self.experts.placement
        known = now or before
        if now is before or known is None:
            return
        order = range(self.experts.num_experts) if before is None else before.order
        exchange([local(t) for t in copies], order, self.experts.order, known.group)
        self.placement = now

    def to_global(self, copies: dict[str, Any]) -> dict[str, Any]:
        """Copies in the order of global ids, for a state dict."""
        return copies if self.placement is None else self.placement.to_global(copies, STATE_DICT)

    def to_slots(self, copies: dict[str, Any]) -> dict[str, Any]:
        """The reverse of `to_global`. Tensors that are not spread over ranks stay as they are."""
        spread = {name: t for name, t in copies.items() if isinstance(t, DTensor)}
        return copies if self.placement is None else copies | self.placement.to_slots(spread, STATE_DICT)


def in_global_order(experts: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Hook after `Experts` has put its tensors into a state dict: experts that are placed get their usual order.

    It makes copies, and all ranks that share the experts call it.
    """
    placement: Placement | None = experts.placement
    if placement is not None:
        names = [prefix + name for name, _ in stacked(experts)]
        state.update(placement.to_global({name: state[name] for name in names if name in state}, STATE_DICT))


def load_into_slots(experts: Any, state: dict[str, Any], prefix: str) -> None:
    """Before `Experts` load a state dict, replace tensors in it by this rank's part, in the order of the slots.

    Raises:
        ValueError: as `take_parts`. If experts are placed, on every rank.
    """
    placement: Placement | None = experts.placement
    if placement is None:
        take_parts(experts, state, prefix)
        return
    names = [prefix + name for name, _ in stacked(experts)]
    spread, fault = {name: state[name] for name in names if isinstance(state.get(name), DTensor)}, None
    try:
        take_parts(experts, state, prefix, placement.order)
    except ValueError as error:
        fault = error
    state.update(placement.to_slots(spread, STATE_DICT, fault))


def stacked(experts: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers of experts by name, each tied one under all of its names."""
    return [*experts.named_parameters(remove_duplicate=False), *experts.named_buffers(remove_duplicate=False)]


def check_home(model: nn.Module, before: str) -> None:
    """Raise ValueError if experts of a model are placed; `before` says what needs them in the order of their ids."""
    if any(getattr(module, "_placement", None) is not None for module in model.modules()):
        raise ValueError(
            "place_experts has put experts into another order than that of their ids: call place_experts(model, mesh, "
            f"optimizer, None) before {before}"
        )


def check_alike(notes: dict[str, str], fault: Exception | None, group: ProcessGroup, what: str) -> None:
    """Raise on every rank of a group if one has a fault, or unless all have the same notes.

    Raises:
        ValueError: with the text of the fault, or the note that differs.
    """
    everyones: list[Any] = [None] * dist.get_world_size(group)
    with named(what, group):
        dist.all_gather_object(everyones, (notes, None if fault is None else str(fault)), group)
    if fault is not None:
        raise fault
    ranks, first = dist.get_process_group_ranks(group), everyones[0][0]
    for rank, (theirs, text) in zip(ranks, everyones, strict=True):
        if text is not None:
            raise ValueError(f"rank {rank}: {text}")
        if apart := [each for each in {**first, **theirs} if first.get(each) != theirs.get(each)]:
            raise ValueError(
                f"{what}: {apart[0]} is {first.get(apart[0], 'missing')} on rank {ranks[0]} and "
                f"{theirs.get(apart[0], 'missing')} on rank {rank}: give all ranks the same"
            )


def sizes_of(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Notes about tensors, for `check_alike`."""
    return {name: f"{t.dtype} {list(t.shape)}" for name, t in tensors.items()}


@torch.no_grad()
def exchange(tensors: Sequence[Tensor], before: Sequence[int], after: Sequence[int], group: ProcessGroup) -> None:
    """Move experts from the slots of one order to those of another, in place, by one all-to-all.

    Only experts that change rank travel. All ranks of the group call it with the same orders and like tensors.

    Args:
        tensors: local parts of stacked tensors, each [E / W, ...].
        before, after: global id of the expert in each slot.
        group: ranks of the slots.

    Raises:
        DispatchError: the exchange failed. Tensors of this rank are unchanged, those of others may not be.
    """
    ranks, rank, was = dist.get_world_size(group), dist.get_rank(group), {e: slot for slot, e in enumerate(before)}
    held = len(before) // ranks
    moves = [(was[expert], slot) for slot, expert in enumerate(after) if was[expert] != slot]
    if not moves or not tensors:
        return
    stay = [(start, stop) for start, stop in moves if start // held == stop // held == rank]  # in another slot here
    leave = [move for move in moves if move[0] // held == rank and move not in stay]  # in the order of their new slots
    arrive = sorted((m for m in moves if m[1] // held == rank and m not in stay), key=lambda move: move[0] // held)

    sizes, device = [t[0].nbytes for t in tensors], tensors[0].device
    came = torch.empty(len(arrive), sum(sizes), dtype=torch.uint8, device=device)
    sent = torch.empty(len(leave), sum(sizes), dtype=torch.uint8, device=device)
    for row, (start, _) in zip(sent, leave, strict=True):
        for part, t in zip(row.split(sizes), tensors, strict=True):
            part.copy_(t[start % held].contiguous().flatten().view(torch.uint8))
    send, recv = [0] * ranks, [0] * ranks
    for _, stop in leave:
        send[stop // held] += 1
    for start, _ in arrive:
        recv[start // held] += 1
    with named("experts that change their ranks", group):
        dist.all_to_all_single(came, sent, recv, send, group=group)

    shifted = [[t[start % held].clone() for t in tensors] for start, _ in stay]
    for rows, (_, stop) in zip(shifted, stay, strict=True):
        for row, t in zip(rows, tensors, strict=True):
            t[stop % held].copy_(row)
    for row, (_, stop) in zip(came, arrive, strict=True):
        for part, t in zip(row.split(sizes), tensors, strict=True):
            here = t[stop % held]
            here.copy_(part.clone().view(t.dtype).view(here.shape))  # a clone is aligned for any dtype
