"""Sort assignments of tokens to experts: `Plan` says which token fills which row, sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cuda.launch import backends
from . import kernels
from .place import LayerCall, Place


def load(expert: Tensor, num_experts: int) -> Tensor:
    """Number of assignments of each expert.

    Args:
        expert: int64 [..., k], expert ids; -1 = no expert.
        num_experts: number of experts E.

    Returns:
        int64 [E]. Its shape does not depend on the data, and no host sync is needed, unlike with `bincount`.

    >>> load(torch.tensor([[0, 2], [2, -1], [2, 0]]), num_experts=4).tolist()
    [2, 0, 3, 0]
    """
    # Dropped assignments, -1, are counted in an extra bin. It is the last one, so that the result starts its storage:
    # compiled code takes results of operators to be aligned. A remainder is one launch.
    bins = expert.flatten().remainder(num_experts + 1)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=bins.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins))[:num_experts]


@dataclass(frozen=True)
class Plan:
    """The permutation of one forward: which row each assignment of a token to an expert has.

    Rows are sorted by expert, then by token, with a stable sort. So a routing has exactly one plan, and experts get
    the same bytes from every transport. Shapes depend on T, k, E and `capacity` alone, so a plan needs no host sync.

    A ragged plan (`capacity` None) has ``R = T * k`` rows. Kept assignments come first, with experts back to back.
    A padded plan has ``R = E * capacity`` rows, `capacity` for each expert. Rows without an assignment are empty.

    Attributes:
        expert: int64 [T, k], expert of each assignment; -1 = dropped or unused.
        token: int64 [R], token in each row; -1 = empty row.
        slot: int64 [T, k], row of each assignment; -1 = none. It is the inverse of `token`.
        counts: int64 [E], rows of each expert; in a padded plan `capacity` each.
        capacity: rows of each expert in a padded plan; None if ragged.
        place: the layer that the plan belongs to; None, the default, outside of `parallelize`.
        call: the forward that the plan belongs to, set when its rows leave; None before, and if there is no `place`.
        follows_load: whether `capacity` comes from the load of this rank, so that ranks must agree on the largest.

    >>> plan = Plan.of(torch.tensor([[1, 0], [1, -1]]), num_experts=2)
    >>> plan.token.tolist(), plan.slot.tolist(), plan.counts.tolist()
    ([0, 0, 1, -1], [[1, 0], [2, -1]], [1, 2])
    >>> Plan.of(torch.tensor([[1, 0], [1, -1]]), num_experts=2, capacity=3).token.tolist()
    [0, -1, -1, 0, 1, -1]
    """

    expert: Tensor
    token: Tensor
    slot: Tensor
    counts: Tensor
    capacity: int | None = None
    place: Place | None = None
    call: LayerCall | None = None
    follows_load: bool = False

    @classmethod
    def of(
        cls,
        expert: Tensor,
        num_experts: int,
        capacity: int | None = None,
        place: Place | None = None,
        follows_load: bool = False,
    ) -> Plan:
        """Make the plan of a routing.

        Args:
            expert: int64 [T, k], expert ids; -1 = dropped or unused.
            num_experts: number of experts E, on all ranks together.
            capacity: rows for each expert. No expert may have more assignments (`moe.capacity` drops them before).
                None, the default, makes a ragged plan.
            place: the layer that the plan belongs to; None, the default, outside of `parallelize`.
            follows_load: whether `capacity` comes from the load of this rank; False by default.

        Raises:
            ValueError: `expert` is not int64 [T, k].
        """
        if expert.ndim != 2 or expert.dtype != torch.int64:
            raise ValueError(f"expert must be int64 [T, k]; got {expert.dtype} {tuple(expert.shape)}")
        kernel = expert.device.type in backends and kernels.can_plan(expert, num_experts)
        make = _plan if kernel or torch.compiler.is_compiling() else _sorted
        token, slot, counts = make(expert, num_experts, capacity)
        return cls(expert, token, slot, counts, capacity, place, follows_load=follows_load)

    def started(self, chunks: int = 1) -> Plan:
        """The same plan, as its rows leave in `chunks` chunks: this starts a forward of its layer."""
        if self.place is None or torch.compiler.is_compiling():  # a graph cannot hold a number that changes
            return self
        call = self.place.start_call() if self.call is None else self.call
        return replace(self, call=call._replace(chunks=chunks))

    def has_equal_blocks(self, promised: bool) -> bool:
        """Whether all ranks send equal blocks without exchanging sizes: it is padded, and equal tokens are `promised`.

        Raises:
            ValueError: they are promised, but ranks have to agree on a capacity that follows their loads.
        """
        if promised and self.follows_load:
            raise ValueError(
                'Capacity("as needed") differs between ranks, which equal_tokens=True leaves them no exchange to agree '
                "on: set equal_tokens=False"
            )
        return promised and self.capacity is not None

    def without_rows(self) -> Plan:
        """The plan of the same forward in which no assignment is kept, ragged."""
        none, counts = torch.full_like(self.expert, -1), torch.zeros_like(self.counts)
        return Plan(none, none.flatten(), none, counts, None, self.place, self.call)

    def padded(self, capacity: int) -> Plan:
        """The same assignments with `capacity` rows for each expert, at least as many as any expert has now.

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
        token = torch.full((rows + 1,), -1, device=slot.device)  # dropped assignments write to the extra row
        token = token.scatter_(0, torch.where(kept, slot, rows).flatten(), source.flatten())[:rows]
        counts = self.counts.clamp(min=capacity)  # all equal; torch 2.13 fails to compile cumsum of a full tensor
        return replace(self, token=token, slot=slot, counts=counts, capacity=capacity)

    def part(self, number: int, parts: int) -> Plan:
        """Part `number` of a plan that is cut into `parts`: each has some of every expert's rows, for all tokens.

        >>> plan = Plan.of(torch.tensor([[0], [0], [1]]), 2)
        >>> [plan.part(i, 2).expert.flatten().tolist() for i in (0, 1)]
        [[0, -1, -1], [-1, 0, 1]]
        >>> [plan.padded(2).part(i, 2).token.tolist() for i in (0, 1)]
        [[0, 2], [1, -1]]
        """
        experts = self.counts.numel()
        start = (self.counts.cumsum(0) - self.counts)[self.expert.clamp(min=0)]
        place = self.slot - start  # position among the rows of the expert
        if self.capacity is None:
            rows = self.counts[self.expert.clamp(min=0)]
            inside = (self.slot >= 0) & (((place + 1) * parts - 1) // rows.clamp(min=1) == number)  # as `shares` cuts
            whole = Plan.of(self.expert.masked_fill(~inside, -1), experts, place=self.place)
            return replace(whole, call=self.call)
        first, end = (i * self.capacity // parts for i in (number, number + 1))
        inside = (self.slot >= 0) & (place >= first) & (place < end)
        slot = torch.where(inside, self.expert * (end - first) + place - first, -1)
        expert = torch.where(inside, self.expert, -1)
        token = self.token.view(experts, self.capacity)[:, first:end].flatten()
        counts = torch.zeros_like(self.counts) + end - first
        return replace(self, expert=expert, token=token, slot=slot, counts=counts, capacity=end - first)

    def trimmed(self, rows: int) -> Plan:
        """The same plan without the empty rows at its end. `rows` is counts.sum(), known to the host."""
        return replace(self, token=self.token[:rows])

    def compact(self) -> Plan:
        """The same assignments, ragged and without empty rows. The host waits for their number.

        >>> plan = Plan.of(torch.tensor([[1], [-1], [1]]), num_experts=2, capacity=3).compact()
        >>> plan.token.tolist(), plan.slot.tolist(), plan.counts.tolist()
        ([0, 2], [[0], [-1], [1]], [0, 2])
        """
        filled = self.token >= 0
        row = F.pad(filled.cumsum(0) - 1, (0, 1), value=-1)  # slots of -1 read the extra row
        counts = load(self.expert, self.counts.numel())
        return replace(self, token=self.token[filled], slot=row[self.slot], counts=counts, capacity=None)

    def reordered(self, order: Tensor) -> Plan:
        """The same assignments with permuted rows: row r of the result is row order[r] of this plan.

        Afterwards rows are no longer sorted by expert. Dispatchers use this if their send buffer has another order.

        Args:
            order: int64, a permutation of rows. It may leave out empty rows.

        >>> plan = Plan.of(torch.tensor([[1, 0], [1, -1]]), num_experts=2).reordered(torch.tensor([1, 2, 0]))
        >>> plan.token.tolist(), plan.slot.tolist()
        ([0, 1, 0], [[0, 2], [1, -1]])
        """
        place = torch.full((self.token.shape[0] + 1,), -1, device=order.device)  # slots of -1 read the extra row
        place = place.scatter_(0, order, torch.arange(order.numel(), device=order.device))
        return replace(self, token=self.token[order], slot=place[self.slot])


class Tokens(NamedTuple):
    """Tokens that are not permuted yet. Experts that gather take them in place of rows, and return tokens [T, D].

    The router's weights are passed beside them as [T, k].
    """

    x: Tensor  # [T, D]
    plan: Plan


@torch.library.custom_op("turnout::plan", mutates_args=())
def _plan(expert: Tensor, num_experts: int, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    if expert.device.type in backends and kernels.can_plan(expert, num_experts):
        return kernels.plan(expert, num_experts, capacity)
    return _sorted(expert, num_experts, capacity)


def _sorted(expert: Tensor, num_experts: int, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """token, slot and counts of `Plan`, in plain PyTorch."""
    flat = expert.flatten()
    order = torch.where(flat < 0, num_experts, flat).argsort(stable=True)  # dropped assignments go last
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
