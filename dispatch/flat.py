"""Flat all-to-all: every rank exchanges sizes with every other rank of the group, then rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange, repeat
from torch import Tensor
from torch.distributed import ProcessGroup

from .agreement import NOTE, Note, agree
from .dispatcher import Batch, SteppedDispatcher
from .place import LayerCall
from .plan import Plan
from .reorder import decode, encode, encode_weight, permute
from .row_blocks import invert, reorder
from .steps import Read, Ready, Rows, Sizes, Steps


class _Receipt(NamedTuple):
    plan: Plan
    send: list[int] | None  # rows to each rank; None if all blocks are equal
    recv: list[int] | None
    order: Tensor  # from (source, expert), as rows arrive, to (expert, source), as experts get them
    inverse: Tensor


@dataclass(frozen=True)
class FlatDispatcher(SteppedDispatcher):
    """Sends each row straight to the rank that owns its expert, in one all-to-all.

    Rows leave sorted by expert, and rank w owns experts [w*L, (w+1)*L). So the output of `encode` is the send buffer. A
    ragged plan exchanges sizes first, with one host sync. A padded plan sends equal blocks.

    Args:
        group: the W ranks that share the experts.
        equal_tokens: True promises that all ranks always have the same number of tokens. Padded plans then exchange no
            sizes: no host sync, and no check that ranks agree. ``"check"`` exchanges sizes all the same and raises if
            the promise is broken. False, the default, promises nothing.

    Examples:
        On the ranks of a mesh with axis "ep"::

            layer.dispatcher = FlatDispatcher(mesh.get_group("ep"))
    """

    group: ProcessGroup
    equal_tokens: bool | Literal["check"] = False

    @property
    def size(self) -> int:
        """W, the number of ranks that share the experts."""
        return dist.get_world_size(self.group)

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """The one group, as a tuple."""
        return (self.group,)

    def dispatch_steps(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        """Exchange sizes, unless all are equal, then rows, and sort the rows by expert."""
        return (self._dispatch_padded if self.is_static(plan) else self._dispatch_sized)(x, plan, weight)

    def _dispatch_sized(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        to = rearrange(plan.counts, "(w l) -> w l", w=self.size)
        note, equal = Note.tensor(x, weight, plan), self.equal_tokens == "check" and not plan.follows_load
        came, send, recv, capacity = yield from self._exchange_sizes(to, note, plan.call, equal)
        if capacity is not None:
            return (yield from self._dispatch_padded(x, plan.padded(capacity), weight))
        plan = plan.trimmed(sum(send))
        yield Ready(came.sum(0), sum(recv), most=max(sum(send), sum(recv)))
        rows, weights = yield Rows((encode(x, plan), encode_weight(weight, plan)), send, recv, self.group)
        order, counts = reorder(came, "w l -> l w", rows=sum(recv))
        return self._hand_out(rows, weights, counts.sum(1), _Receipt(plan, send, recv, order, invert(order)))

    def _dispatch_padded(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        local = plan.counts.numel() // self.size
        counts = plan.counts[:local] * self.size
        yield Ready(counts, plan.token.shape[0])
        rows, weights = yield Rows((encode(x, plan), encode_weight(weight, plan)), None, None, self.group)
        index = torch.arange(rows.shape[0], device=rows.device)
        order = rearrange(index, "(w l c) -> (l w c)", w=self.size, l=local)
        inverse = rearrange(index, "(l w c) -> (w l c)", w=self.size, l=local)
        return self._hand_out(rows, weights, counts, _Receipt(plan, None, None, order, inverse))

    def _hand_out(self, rows: Tensor, weight: Tensor, counts: Tensor, receipt: _Receipt) -> Batch:
        order, inverse = receipt.order, receipt.inverse
        return Batch(permute(rows, order, inverse), permute(weight, order, inverse), counts, receipt)

    def combine_steps(self, rows: Tensor, receipt: _Receipt) -> Steps[Tensor]:
        """Send rows [R, D] back to their ranks and sum the rows of each token -> [T, D]."""
        plan, send, recv, order, inverse = receipt
        (rows,) = yield Rows((permute(rows, inverse, order),), recv, send, self.group)
        return decode(rows, plan)

    def is_static(self, plan: Plan) -> bool:
        """Whether the plan is padded and equal tokens are promised."""
        return plan.has_equal_blocks(promised=self.equal_tokens is True)

    def refuse_steps(self, num_experts: int, device: torch.device) -> Steps[None]:
        """Send a refusal in place of sizes."""
        if self.equal_tokens is not True:  # a promise exchanges no sizes, so no rank would read the note
            nothing = torch.zeros(self.size, num_experts // self.size, dtype=torch.int64, device=device)
            yield from self._exchange_sizes(nothing, Note.refusal(device))
        yield Ready()

    def _exchange_sizes(
        self, to: Tensor, note: Tensor, call: LayerCall | None = None, equal: bool = False
    ) -> Steps[tuple[Tensor, list[int], list[int], int | None]]:
        """Send sizes int64 [W, L] and this rank's note, and check the notes of all ranks.

        Returns:
            Received sizes [W, L], rows to each rank, rows from each rank, and the capacity all ranks agree on.
        """
        notes = repeat(note, "n -> w n", w=self.size)
        came = yield Sizes(torch.cat([notes, to], 1), self.group)
        notes, came = came[:, :NOTE], came[:, NOTE:]
        host = yield Read(torch.cat([to.sum(1), came.sum(1), notes.flatten()]))  # the one host sync
        send, recv, notes = host[: self.size], host[self.size : 2 * self.size], host[2 * self.size :]
        every = [notes[i : i + NOTE] for i in range(0, len(notes), NOTE)]
        capacity = agree(every, call, equal)
        return came, send, recv, capacity
