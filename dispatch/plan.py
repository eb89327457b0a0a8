"""A routing turned into rows: which token fills which row, sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..cuda.launch import backends
from . import kernels
from .place import Place, Visit


def load(expert: Tensor, num_experts: int) -> Tensor:
    """Assignments each expert receives: int64 [..., k] expert ids, -1 = none -> int64 [E].

    A scatter, not `bincount`: no host sync, and the shape does not depend on the data.

    >>> load(torch.tensor([[0, 2], [2, -1], [2, 0]]), num_experts=4).tolist()
    [2, 0, 3, 0]
    """
    ids = expert.flatten()
    bins = torch.where(ids < 0, num_experts, ids)  # the dropped go to a bin of their own
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins))[:num_experts]


@dataclass(frozen=True)
class Plan:
    """Where every assignment of a token to an expert lies among the rows.

    Rows are sorted by expert, then by token, stably, so that a routing has one plan and gives the
    same bytes on every transport. All shapes depend on T, k, E and `capacity` alone: building a plan
    never waits for the device.

    Ragged (`capacity` None): ``R = T * k`` rows, the kept ones first, experts back to back.
    Padded: ``R = E * capacity`` rows, `capacity` for every expert, those not needed being empty.

    Attributes:
        expert: int64 [T, k], the expert of each assignment, -1 = dropped or unused.
        token: int64 [R], row -> the token in it, -1 = an empty row.
        slot: int64 [T, k], assignment -> its row, -1 = none: the inverse of `token`.
        counts: int64 [E], rows per expert (padded: `capacity` each).
        capacity: rows of every expert when padded, None when ragged.
        place: the layer it is made for, if `parallelize` has given it one.
        visit: the forward of that layer, from the moment its rows travel on.

    >>> plan = Plan.of(torch.tensor([[1, 0], [1, -1]]), num_experts=2)
    >>> plan.token.tolist(), plan.slot.tolist(), plan.counts.tolist()
    ([0, 0, 1, -1], [[1, 0], [2, -1]], [1, 2])
    """

    expert: Tensor
    token: Tensor
    slot: Tensor
    counts: Tensor
    capacity: int | None = None
    place: Place | None = None
    visit: Visit | None = None

    @classmethod
    def of(cls, expert: Tensor, num_experts: int, capacity: int | None = None, place: Place | None = None) -> Plan:
        """Plan for int64 `expert` [T, k], padded to `capacity` rows an expert if that is given.

        No expert may hold more than `capacity` assignments then (see `moe.capacity`).
        """
        if expert.ndim != 2 or expert.dtype != torch.int64:
            raise ValueError(f"expert must be int64 [T, k]; got {expert.dtype} {tuple(expert.shape)}")
        kernel = expert.device.type in backends and kernels.places(expert, num_experts)
        make = _plan if kernel or torch.compiler.is_compiling() else _sorted
        token, slot, counts = make(expert, num_experts, capacity)
        return cls(expert, token, slot, counts, capacity, place)

    def visiting(self, chunks: int = 1) -> Plan:
        """The same plan as its rows leave: a forward of its layer starts, to travel in so many chunks."""
        if self.place is None or torch.compiler.is_compiling():  # a graph has no notes, and no numbers that change
            return self
        visit = self.place.visit() if self.visit is None else self.visit
        return replace(self, visit=visit._replace(chunks=chunks))

    def without_rows(self) -> Plan:
        """The plan of the same forward in which no assignment is kept, ragged."""
        none, counts = torch.full_like(self.expert, -1), torch.zeros_like(self.counts)
        return Plan(none, none.flatten(), none, counts, None, self.place, self.visit)

    def padded(self, capacity: int) -> Plan:
        """The same assignments with `capacity` rows for every expert, at least as many as now.

        >>> Plan.of(torch.tensor([[1], [1]]), num_experts=2).padded(3).token.tolist()
        [-1, -1, -1, 0, 1, -1]
        """
        if capacity == self.capacity:
            return self
        kept = self.slot >= 0
        start = (self.counts.cumsum(0) - self.counts)[self.expert.clamp(min=0)]
        slot = torch.where(kept, self.expert * capacity + self.slot - start, -1)
        rows = self.counts.numel() * capacity
        source = torch.arange(slot.shape[0], device=slot.device).unsqueeze(1).expand_as(slot)
        token = torch.full((rows + 1,), -1, device=slot.device)  # one more: the dropped land there
        token = token.scatter_(0, torch.where(kept, slot, rows).flatten(), source.flatten())[:rows]
        counts = self.counts.clamp(min=capacity)  # all equal; torch 2.13 fails to compile cumsum of a full tensor
        return replace(self, token=token, slot=slot, counts=counts, capacity=capacity)

    def trimmed(self, rows: int) -> Plan:
        """The same plan without its empty rows at the end; `rows` = counts.sum(), as the host knows it."""
        return replace(self, token=self.token[:rows])

    def reordered(self, order: Tensor) -> Plan:
        """The same assignments with rows in another order, new row r being row order[r] of now.

        `order`, int64, has every row that is not empty. Rows are no longer sorted by expert: this is for
        dispatchers whose send buffer lies otherwise.

        >>> plan = Plan.of(torch.tensor([[1, 0], [1, -1]]), num_experts=2).reordered(torch.tensor([1, 2, 0]))
        >>> plan.token.tolist(), plan.slot.tolist()
        ([0, 1, 0], [[0, 2], [1, -1]])
        """
        place = torch.full((self.token.shape[0] + 1,), -1, device=order.device)  # its last is for slots of -1
        place = place.scatter_(0, order, torch.arange(order.numel(), device=order.device))
        return replace(self, token=self.token[order], slot=place[self.slot])


class Tokens(NamedTuple):
    """Rows that nobody has laid out: experts that gather take them in place of rows, and give tokens [T, D] back.

    The router's weights go beside them as they are, [T, k].
    """

    x: Tensor  # [T, D]
    plan: Plan


@torch.library.custom_op("turnout::plan", mutates_args=())
def _plan(expert: Tensor, num_experts: int, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    if expert.device.type in backends and kernels.places(expert, num_experts):
        return kernels.plan(expert, num_experts, capacity)
    return _sorted(expert, num_experts, capacity)


def _sorted(expert: Tensor, num_experts: int, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """token, slot and counts in plain PyTorch."""
    flat = expert.flatten()
    order = torch.where(flat < 0, num_experts, flat).argsort(stable=True)  # the dropped behind the kept
    counts = load(expert, num_experts)
    row = torch.arange(flat.numel(), device=flat.device)
    filled = row < counts.sum()
    token = torch.where(filled, order // max(expert.shape[1], 1), -1)
    slot = torch.empty_like(flat).scatter_(0, order, torch.where(filled, row, -1)).view_as(expert)
    plan = Plan(expert, token, slot, counts)
    plan = plan if capacity is None else plan.padded(capacity)
    return plan.token, plan.slot, plan.counts


@_plan.register_fake
def _(expert: Tensor, num_experts: int, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    rows = expert.numel() if capacity is None else num_experts * capacity
    return expert.new_empty(rows), expert.new_empty(expert.shape), expert.new_empty(num_experts)
