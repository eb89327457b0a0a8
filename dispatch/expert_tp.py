"""Dispatch for experts with tensor parallelism: each rank holds a slice of every expert's hidden width."""

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
from .node import Hop
from .place import LayerCall
from .plan import Plan
from .reorder import encode, encode_weight, permute
from .row_blocks import invert, reorder
from .steps import Read, Ready, Sizes, Steps, until_ready


class _Receipt(NamedTuple):
    inner: Any
    hop: Hop  # sends each row to every slice, and sums the outputs of the slices
    order: Tensor  # from (source, expert), as rows arrive, to (expert, source), as experts get them
    inverse: Tensor


@dataclass(frozen=True)
class TensorParallelDispatcher(SteppedDispatcher):
    """Extends another dispatcher to experts whose hidden width is split over a group (axis "etp").

    ``W_down act(W_up x)`` is a sum over the hidden width. So each of the t ranks computes it for H / t of the width,
    and the parts are added. `inner` brings rows to the experts of this rank. The group then gathers the rows of all its
    ranks, and combine returns to each rank the sums of its rows. The backward sums gradients of rows and weights over
    the slices in the same way. Inside the group, (t - 1) / t of all rows are sent, in dispatch and in combine.

    All ranks of the group have the same rows in the same order: by expert, then by rank of the group, then as from
    `inner`. Each dispatch costs a second host sync, for the sizes inside the group.

    A layer's `parallelism` r below t gathers slices: t / r ranks next to each other then have the same, wider one, and
    rows visit one rank of each such block (`WeightTravel`). Sizes and notes go to all t ranks whatever r is.

    Args:
        inner: the dispatcher over the ranks that hold the same slice (axis "ep").
        group: the t ranks whose slices make up the same experts.

    Raises:
        TypeError: `inner` is no `SteppedDispatcher`.

    References:
        Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053. FastMoE 0.3 has it for experts.
    """

    inner: SteppedDispatcher
    group: ProcessGroup

    def __post_init__(self) -> None:
        if not isinstance(self.inner, SteppedDispatcher):
            raise TypeError(
                "inner must be a SteppedDispatcher, whose sizes are known before its rows; got "
                f"{type(self.inner).__name__}. With one rank on axis ep, take FlatDispatcher over a group of one rank"
            )

    def dispatch_steps(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        """Exchange sizes as `inner` does, then in the group; then rows in the same order."""
        inner = self.inner.dispatch_steps(x, plan, weight)
        try:
            ready = yield from until_ready(inner)
        except DispatchError as error:
            yield from self._pass_on(plan.counts.numel(), x.device, plan.call, error.met)
            raise
        assert ready.counts is not None
        came, recv = yield from self._exchange_sizes(ready.counts, Note.tensor(x, weight, plan), plan.call)
        visited = self._visited(plan.call)
        yield Ready(came.sum(0), sum(recv), most=max(ready.most, ready.rows * len(visited)))

        batch = yield from inner
        slices = torch.tensor(visited, device=x.device).expand(ready.rows, -1)
        send = [ready.rows if slot in visited else 0 for slot in range(len(recv))]
        hop = Hop(Plan.of(slices, len(recv)), self.group, send, recv)
        weights = batch.weight.unsqueeze(1).expand(-1, len(visited))
        rows, weights = yield hop.dispatch(encode(batch.rows, hop.plan), encode_weight(weights, hop.plan))
        order, counts = reorder(came, "s l -> l s", rows=sum(recv))
        receipt = _Receipt(batch.receipt, hop, order, invert(order))
        rows, weights = (permute(t, order, receipt.inverse) for t in (rows, weights))
        return Batch(rows, weights, counts.sum(1), receipt)

    def combine_steps(self, rows: Tensor, receipt: _Receipt) -> Steps[Tensor]:
        """Sum the slices' parts of each row [R, D] on the rank that the row came from, then combine of `inner`."""
        rows = yield from receipt.hop.combine(permute(rows, receipt.inverse, receipt.order))
        return (yield from self.inner.combine_steps(rows, receipt.inner))

    def refuse_steps(self, num_experts: int, device: torch.device) -> Steps[None]:
        """Send refusals to the ranks of `inner`, then to the group."""
        with suppress(DispatchError):
            yield from until_ready(self.inner.refuse_steps(num_experts, device))
        yield from self._pass_on(num_experts, device)
        yield Ready()

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """The groups of `inner`, and the group of the slices. Together they connect all ranks."""
        return *self.inner.groups, self.group

    def _visited(self, call: LayerCall | None) -> list[int]:
        """The ranks of the group that rows of this one visit: one of each block of ranks with the same slice.

        It is at this rank's place in its block. So the ranks that it sends to are those that send to it.
        """
        size = dist.get_world_size(self.group)
        blocks = size if call is None or call.parallelism < 1 else call.parallelism
        each = size // blocks
        return list(range(dist.get_rank(self.group) % each, size, each))

    def _pass_on(
        self, num_experts: int, device: torch.device, call: LayerCall | None = None, met: int = -1
    ) -> Steps[None]:
        """Tell the group that `inner` failed on this rank, because its other ranks may not know."""
        ranks = torch.tensor([dist.get_world_size(group) for group in self.inner.groups]).prod()
        nothing = torch.zeros(num_experts // int(ranks), dtype=torch.int64, device=device)
        with suppress(DispatchError):  # the error of `inner` is the one to raise
            yield from self._exchange_sizes(nothing, Note.refusal(device, call, met))

    def _exchange_sizes(
        self, counts: Tensor, note: Tensor, call: LayerCall | None = None
    ) -> Steps[tuple[Tensor, list[int]]]:
        """Exchange counts int64 [L] in the group.

        Returns:
            Counts of every rank [t, L], 0 for ranks that send no rows to this one, and their sum for each rank.
        """
        size = dist.get_world_size(self.group)
        came = yield Sizes(repeat(torch.cat([note, counts]), "n -> s n", s=size), self.group)
        notes, came = came[:, :NOTE], came[:, NOTE:]
        if len(visited := self._visited(call)) < size:
            sends = torch.tensor([slot in visited for slot in range(size)], device=came.device)
            came = came * sends.unsqueeze(1)
        host = yield Read(torch.cat([came.sum(1), notes.flatten()]))
        agree([host[i : i + NOTE] for i in range(size, len(host), NOTE)], call)
        return came, host[:size]
