"""Two all-to-alls in place of one: inside the node first, then between nodes (2DH).

Ranks are numbered node by node. In two nodes of two, rank 0's row for rank 3 goes by way of rank 1, the rank
of its own node whose place is that of the destination in the other node::

    node 0:  rank 0 --inside--> rank 1
                                   |
                                between
                                   v
    node 1:  rank 2             rank 3

Rank 1 has then all that its node sends to rank 3, and sends it in one piece: between N nodes of M ranks, every
rank sends N - 1 messages and not (N - 1) * M, each M times as long. The price is one more trip inside the node.
The layouts in between are those of 2DH in Tutel (arXiv:2206.03382).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange, repeat
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .agreement import NOTE, Note, agree
from .collectives import all_to_all
from .dispatcher import Batch, NodeLocalDispatcher
from .mesh import node_and_local
from .place import Visit
from .plan import Plan
from .reorder import decode, encode, encode_weight, permute
from .row_blocks import invert, reorder
from .steps import Read, Ready, Rows, Sizes, Steps


def all_to_all_2d(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Equal blocks to every rank of a mesh with axes "node" and "local", by way of 2DH; differentiable.

    x [W * r, ...], of which block w goes to rank w = node * locals + local, comes back as the blocks of
    all ranks in their order: bit for bit what `all_to_all` over the W ranks gives. On 2 x 2 ranks, r = 1::

        rank 0: a b c d   -> inside: a c to 0, b d to 1   rank 0 has  a e c g   -> between: a e to 0, c g to 2
        rank 1: e f g h   -> inside: e g to 0, f h to 1   rank 1 has  b f d h   -> between: b f to 1, d h to 3

    Args:
        x: on every rank the same shape and dtype.
        mesh: its ranks ascend along the two axes, node before local.
    """
    node, local = node_and_local(mesh)
    nodes, places = dist.get_world_size(node), dist.get_world_size(local)
    if x.ndim == 0 or x.shape[0] % (nodes * places):
        raise ValueError(f"x must be [{nodes * places} * r, ...], an equal block for each rank; got {tuple(x.shape)}")
    (x,) = all_to_all(rearrange(x, "(n l r) ... -> (l n r) ...", n=nodes, l=places), group=local)
    (x,) = all_to_all(rearrange(x, "(l n r) ... -> (n l r) ...", n=nodes, l=places), group=node)
    return x


_Splits = tuple[list[int] | None, list[int] | None]  # rows to and from each rank of a group; None: equal blocks
_Order = tuple[Tensor, Tensor]  # an order and its inverse, as `permute` takes them


class _Sizes(NamedTuple):
    """Rows of each block at the three places of a trip, e being an expert of the rank it ends on."""

    leaving: Tensor  # [n, l, e] of this rank, by destination
    passing: Tensor  # [l, n, e] by source (a rank of this node) and node of the destination
    arriving: Tensor  # [n, l, e] by source
    rows: tuple[int, int, int]  # the sums of these three, which the host knows
    inside: _Splits
    between: _Splits

    @classmethod
    def even(cls, leaving: Tensor, rows: int) -> _Sizes:
        """Of a padded plan: all blocks are equal, so nobody needs to tell."""
        passing = rearrange(leaving, "n l e -> l n e")
        return cls(leaving, passing, leaving, (rows, rows, rows), (None, None), (None, None))


class _Receipt(NamedTuple):
    plan: Plan  # its rows in the order in which they left
    inside: _Splits
    between: _Splits
    middle: _Order  # arrived by (source, node of the destination, expert) -> sent on by (node, source, expert)
    last: _Order  # arrived by (source, expert) -> handed out by (expert, source)


@dataclass(frozen=True)
class HierarchicalDispatcher(NodeLocalDispatcher):
    """Rows travel inside their node first, then between nodes, in few large messages (see this module).

    Rank node * locals + local owns the experts it would own with `FlatDispatcher`, and gets the same rows
    in the same order: results and gradients are the same to the bit. Sizes and the notes of all ranks
    make both steps before any row does, so a ragged plan costs one host sync, like there.

    Args:
        node: the ranks with this one's place in their nodes, in the order of the nodes.
        local: the ranks of this node. Rank (n, l) is rank n * len(local) + l of those that share the experts.
        equal_tokens: as in `FlatDispatcher`: no host sync for padded plans, and nothing is checked; or ``"check"``.
    """

    node: ProcessGroup
    local: ProcessGroup
    equal_tokens: bool | Literal["check"] = False

    def dispatch_steps(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        """Sizes of both exchanges, unless all are equal; then the rows through both."""
        return (self._dispatch_padded if self.is_static(plan) else self._dispatch_sized)(x, plan, weight)

    def _dispatch_sized(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        note = Note.tensor(x, weight, plan)
        equal = self.equal_tokens == "check" and not plan.follows_load
        sizes, capacity = yield from self._exchange_sizes(self._by_rank(plan.counts), note, plan.visit, equal)
        if capacity is not None:
            return (yield from self._dispatch_padded(x, plan.padded(capacity), weight))
        return (yield from self._carry(x, plan, weight, sizes))

    def _dispatch_padded(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        return self._carry(x, plan, weight, _Sizes.even(self._by_rank(plan.counts), rows=plan.token.shape[0]))

    def combine_steps(self, rows: Tensor, receipt: _Receipt) -> Steps[Tensor]:
        """Rows [R, D] back by the way they came, summed per token -> [T, D]."""
        (send_inside, recv_inside), (send, recv) = receipt.inside, receipt.between
        (rows,) = yield Rows((permute(rows, *receipt.last[::-1]),), recv, send, self.node)
        (rows,) = yield Rows((permute(rows, *receipt.middle[::-1]),), recv_inside, send_inside, self.local)
        return decode(rows, receipt.plan)

    def is_static(self, plan: Plan) -> bool:
        """Where equal tokens are promised, a padded plan."""
        if self.equal_tokens is True and plan.follows_load:
            raise ValueError(
                'Capacity("as needed") differs between ranks, which equal_tokens=True leaves them no exchange to agree '
                "on: set equal_tokens=False"
            )
        return self.equal_tokens is True and plan.capacity is not None

    def refuse_steps(self, num_experts: int, device: torch.device) -> Steps[None]:
        """A note of refusal in place of sizes."""
        if self.equal_tokens is not True:  # no sizes are exchanged then, so there is nothing to write the note on
            nothing = torch.zeros(num_experts, dtype=torch.int64, device=device)
            yield from self._exchange_sizes(self._by_rank(nothing), Note.refusal(device))
        yield Ready()

    def _by_rank(self, counts: Tensor) -> Tensor:
        nodes, places = self.shape
        return rearrange(counts, "(n l e) -> n l e", n=nodes, l=places)

    def _exchange_sizes(
        self, leaving: Tensor, note: Tensor, visit: Visit | None = None, equal: bool = False
    ) -> Steps[tuple[_Sizes, int | None]]:
        """leaving [n, l, e] and this rank's note -> the sizes of the whole trip, and the capacity all agree on."""
        nodes, places = self.shape
        # Notes come first: so they are found in the message of a rank whose layer has other sizes.
        notes = repeat(note, "i -> l i", l=places)
        came = yield Sizes(torch.cat([notes, rearrange(leaving, "n l e -> l (n e)")], 1), self.local)
        notes, passing = came[:, :NOTE], rearrange(came[:, NOTE:], "l (n e) -> l n e", n=nodes)
        notes = repeat(notes, "l i -> n (l i)", n=nodes)
        came = yield Sizes(torch.cat([notes, rearrange(passing, "l n e -> n (l e)")], 1), self.node)
        notes, arriving = came.split([notes.shape[1], came.shape[1] - notes.shape[1]], 1)
        arriving = rearrange(arriving, "n (l e) -> n l e", l=places)
        sums = leaving.sum((0, 2)), passing.sum((1, 2)), passing.sum((0, 2)), arriving.sum((1, 2))
        host = iter((yield Read(torch.cat([*sums, notes.flatten()]))))  # the one host sync
        to_local, from_local, to_node, from_node = (list(islice(host, len(s))) for s in sums)
        notes = [list(islice(host, NOTE)) for _ in range(nodes * places)]
        capacity = agree(notes, visit, equal)
        rows = sum(to_local), sum(from_local), sum(from_node)
        return _Sizes(leaving, passing, arriving, rows, (to_local, from_local), (to_node, from_node)), capacity

    def _carry(self, x: Tensor, plan: Plan, weight: Tensor, sizes: _Sizes) -> Steps[Batch]:
        leave, passed, arrived = sizes.rows
        yield Ready(sizes.arriving.sum((0, 1)), arrived)
        first, _ = reorder(sizes.leaving, "n l e -> l n e", leave)
        plan = plan.reordered(first)  # encode and decode read rows where they lie: no pass of their own for this
        both = encode(x, plan), encode_weight(weight, plan)
        both = yield Rows(both, *sizes.inside, self.local)
        order, _ = reorder(sizes.passing, "l n e -> n l e", passed)
        middle = order, invert(order)
        both = tuple(permute(t, *middle) for t in both)
        both = yield Rows(both, *sizes.between, self.node)
        order, counts = reorder(sizes.arriving, "n l e -> e n l", arrived)
        last = order, invert(order)
        rows, weights = (permute(t, *last) for t in both)
        return Batch(rows, weights, counts.sum((1, 2)), _Receipt(plan, sizes.inside, sizes.between, middle, last))
