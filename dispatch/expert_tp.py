"""Experts split inside: a rank holds a slice of each expert's hidden width, and rows visit all slices."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from einops import repeat
from torch import Tensor
from torch.distributed import ProcessGroup

from .agreement import NOTE, DispatchError, Note, agree
from .dispatcher import Batch, SteppedDispatcher
from .node import Leg
from .place import Visit
from .plan import Plan
from .reorder import encode, encode_weight, permute
from .row_blocks import invert, reorder
from .steps import Read, Ready, Sizes, Steps, until_ready


class _Receipt(NamedTuple):
    inner: Any
    visit: Leg  # each row goes to every slice, and the slices' outputs add up
    order: Tensor  # arrived by (source, expert) -> handed out by (expert, source)
    inverse: Tensor


@dataclass(frozen=True)
class TensorParallelDispatcher(SteppedDispatcher):
    """Another dispatcher's trips, to experts whose hidden width is split over a group (axis "etp").

    ``W_down act(W_up x)`` is a sum over the hidden width, so each of t ranks can compute it for H / t of that
    and the parts add up (Megatron-LM, arXiv:1909.08053; for experts: FastMoE 0.3). Every rank has tokens of
    its own: `inner` brings rows to the experts of this rank, the group gathers those of all its ranks,
    and on the way back each rank gets its rows again as sums. Backward is the mirror image: gradients of rows
    and weights are summed over the slices. (t - 1) / t of the rows travel inside the group, out and home.

    The order of rows, (expert, rank of the group, as from `inner`), is the same on all its ranks. Each dispatch
    costs a second host sync, for the sizes inside the group.

    A layer's `parallelism` r below t gathers slices: t / r ranks next to each other then have the same, wider one, and
    rows visit one rank of each such block (`WeightTravel`). Sizes and notes go to all t ranks whatever r is.

    Args:
        inner: exchanges over the ranks that hold the same slice (axis "ep").
        group: the t ranks whose slices make up the same experts.
    """

    inner: SteppedDispatcher
    group: ProcessGroup

    def __post_init__(self) -> None:
        if not isinstance(self.inner, SteppedDispatcher):
            raise TypeError(
                f"inner must be a SteppedDispatcher, whose sizes are known beforehand; got {type(self.inner).__name__}"
                " (with one rank on the axis ep, FlatDispatcher over a group of one)"
            )

    def dispatch_steps(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        """Sizes of `inner`, then those inside the group; rows likewise."""
        inner = self.inner.dispatch_steps(x, plan, weight)
        try:
            ready = yield from until_ready(inner)
        except DispatchError as error:
            yield from self._pass_on(plan.counts.numel(), x.device, plan.visit, error.met)
            raise
        assert ready.counts is not None
        came, recv = yield from self._exchange_sizes(ready.counts, Note.tensor(x, weight, plan), plan.visit)
        yield Ready(came.sum(0), sum(recv))

        batch = yield from inner
        visited = self._visited(plan.visit)
        slices = torch.tensor(visited, device=x.device).expand(ready.rows, -1)
        send = [ready.rows if slot in visited else 0 for slot in range(len(recv))]
        visit = Leg(Plan.of(slices, len(recv)), self.group, send, recv)
        weights = batch.weight.unsqueeze(1).expand(-1, len(visited))
        rows, weights = yield visit.out(encode(batch.rows, visit.plan), encode_weight(weights, visit.plan))
        order, counts = reorder(came, "s l -> l s", rows=sum(recv))
        receipt = _Receipt(batch.receipt, visit, order, invert(order))
        rows, weights = (permute(t, order, receipt.inverse) for t in (rows, weights))
        return Batch(rows, weights, counts.sum(1), receipt)

    def combine_steps(self, rows: Tensor, receipt: _Receipt) -> Steps[Tensor]:
        """Rows [R, D], each slice's part of them, summed where they came from and then taken home."""
        rows = yield from receipt.visit.home(permute(rows, receipt.inverse, receipt.order))
        return (yield from self.inner.combine_steps(rows, receipt.inner))

    def refuse_steps(self, num_experts: int, device: torch.device) -> Steps[None]:
        """Notes of refusal to both groups."""
        with suppress(DispatchError):
            yield from until_ready(self.inner.refuse_steps(num_experts, device))
        yield from self._pass_on(num_experts, device)
        yield Ready()

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """Those of `inner`, and the one of the slices: one after the other they reach all ranks."""
        return *self.inner.groups, self.group

    def _visited(self, visit: Visit | None) -> list[int]:
        """The ranks of the group that rows of this one visit: one of each block of ranks with the same slice.

        It is at this rank's place in its block. So the ranks that it sends to are those that send to it.
        """
        size = dist.get_world_size(self.group)
        blocks = size if visit is None or visit.parallelism < 1 else visit.parallelism
        each = size // blocks
        return list(range(dist.get_rank(self.group) % each, size, each))

    def _pass_on(
        self, num_experts: int, device: torch.device, visit: Visit | None = None, met: int = -1
    ) -> Steps[None]:
        """Tell the group that this rank's `inner` has failed: the other ranks of it may not know."""
        ranks = torch.tensor([dist.get_world_size(group) for group in self.inner.groups]).prod()
        nothing = torch.zeros(num_experts // int(ranks), dtype=torch.int64, device=device)
        with suppress(DispatchError):  # what went wrong here is said by `inner`
            yield from self._exchange_sizes(nothing, Note.refusal(device, visit, met))

    def _exchange_sizes(
        self, counts: Tensor, note: Tensor, visit: Visit | None = None
    ) -> Steps[tuple[Tensor, list[int]]]:
        """counts int64 [L] of this rank -> those of every rank that sends rows to it [t, L], else 0; and their sums."""
        size = dist.get_world_size(self.group)
        came = yield Sizes(repeat(torch.cat([note, counts]), "n -> s n", s=size), self.group)
        notes, came = came[:, :NOTE], came[:, NOTE:]
        if len(visited := self._visited(visit)) < size:
            sends = torch.tensor([slot in visited for slot in range(size)], device=came.device)
            came = came * sends.unsqueeze(1)
        host = yield Read(torch.cat([came.sum(1), notes.flatten()]))
        agree([host[i : i + NOTE] for i in range(size, len(host), NOTE)], visit)
        return came, host[:size]
