"""Two-phase all-to-all over one group: sizes, then payload."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange, repeat
from torch import Tensor
from torch.distributed import ProcessGroup

from .agreement import NOTE, DispatchError, Note, agree
from .base import Batch, Dispatcher
from .blocks import invert, reorder
from .collectives import all_to_all, exchange_sizes
from .ops import decode, encode, encode_weight, permute
from .plan import Plan


class _Receipt(NamedTuple):
    plan: Plan
    send: list[int] | None  # rows to each rank; None: equal blocks
    recv: list[int] | None
    order: Tensor  # arrived by (source, expert) -> handed out by (expert, source)
    inverse: Tensor


@dataclass(frozen=True)
class FlatDispatcher(Dispatcher):
    """Every rank sends straight to every other one.

    Rows leave sorted by expert, and rank w owns experts [w*L, (w+1)*L): what `encode` writes is the
    send buffer. A ragged plan costs one host sync, for the sizes; a padded one exchanges equal blocks.

    Args:
        group: the W ranks that share the experts.
        equal_tokens: a promise that all ranks always have the same number of tokens, so that padded
            plans need not agree on a capacity first: no host sync at all, and nothing is checked.
    """

    group: ProcessGroup
    equal_tokens: bool = False

    @property
    def size(self) -> int:
        """W, the ranks that share the experts."""
        return dist.get_world_size(self.group)

    def dispatch(self, x: Tensor, plan: Plan, weight: Tensor) -> Batch:
        """Rows [R, D] from all ranks for the experts of this one; raises DispatchError on every rank."""
        if plan.capacity is not None and self.equal_tokens:
            return self._dispatch_padded(x, plan, weight)
        to = rearrange(plan.counts, "(w l) -> w l", w=self.size)
        came, send, recv, capacity = self._exchange_sizes(to, Note.tensor(x, weight, plan.capacity))
        if capacity is not None:
            return self._dispatch_padded(x, plan.padded(capacity), weight)
        plan = plan.trimmed(sum(send))
        rows, weights = all_to_all(encode(x, plan), encode_weight(weight, plan), send=send, recv=recv, group=self.group)
        order, counts = reorder(came, "w l -> l w", rows=sum(recv))
        return self._hand_out(rows, weights, counts.sum(1), _Receipt(plan, send, recv, order, invert(order)))

    def _dispatch_padded(self, x: Tensor, plan: Plan, weight: Tensor) -> Batch:
        rows, weights = all_to_all(encode(x, plan), encode_weight(weight, plan), group=self.group)
        index = torch.arange(rows.shape[0], device=rows.device)
        local = plan.counts.numel() // self.size
        order = rearrange(index, "(w l c) -> (l w c)", w=self.size, l=local)
        inverse = rearrange(index, "(l w c) -> (w l c)", w=self.size, l=local)
        counts = plan.counts[:local] * self.size
        return self._hand_out(rows, weights, counts, _Receipt(plan, None, None, order, inverse))

    def _hand_out(self, rows: Tensor, weight: Tensor, counts: Tensor, receipt: _Receipt) -> Batch:
        order, inverse = receipt.order, receipt.inverse
        return Batch(permute(rows, order, inverse), permute(weight, order, inverse), counts, receipt)

    def combine(self, rows: Tensor, receipt: _Receipt) -> Tensor:
        """Rows [R, D] back to where they came from, summed per token -> [T, D]."""
        plan, send, recv, order, inverse = receipt
        (rows,) = all_to_all(permute(rows, inverse, order), send=recv, recv=send, group=self.group)
        return decode(rows, plan)

    def refuse(self, num_experts: int, device: torch.device) -> None:
        """Send a note of refusal in place of sizes: the other ranks raise DispatchError."""
        if self.equal_tokens:
            return  # no sizes are exchanged, so there is nothing to write the note on
        nothing = torch.zeros(self.size, num_experts // self.size, dtype=torch.int64, device=device)
        with suppress(DispatchError):
            self._exchange_sizes(nothing, Note.refusal(device))

    def _exchange_sizes(self, to: Tensor, note: Tensor) -> tuple[Tensor, list[int], list[int], int | None]:
        """to int64 [W, L], note [5] -> sizes that came [W, L], send and recv splits, agreed capacity."""
        notes = repeat(note, "n -> w n", w=self.size)
        came = exchange_sizes(torch.cat([notes, to], 1), self.group)
        notes, came = came[:, :NOTE], came[:, NOTE:]
        host = torch.cat([to.sum(1, keepdim=True), came.sum(1, keepdim=True), notes], 1).tolist()  # the one host sync
        capacity = agree([line[2:] for line in host])
        return came, [line[0] for line in host], [line[1] for line in host], capacity
