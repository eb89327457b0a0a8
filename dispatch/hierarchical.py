"""Hierarchical all-to-all (2DH): one all-to-all inside each node, then one between nodes.

Ranks are numbered node by node. With two nodes of two ranks, a row of rank 0 for rank 3 goes through rank 1, which has
the local number of rank 3::

    node 0:  rank 0 --inside--> rank 1
                                   |
                                between
                                   v
    node 1:  rank 2             rank 3

Rank 1 then has all rows of its node for rank 3, and sends them as one message. With N nodes of M ranks, each rank sends
N - 1 messages between nodes instead of (N - 1) * M, each M times as long. The cost is one more exchange inside the
node. The order of blocks between the two exchanges is the one of 2DH in Tutel (arXiv:2206.03382).
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
from .place import LayerCall
from .plan import Plan
from .reorder import decode, encode, encode_weight, permute
from .row_blocks import invert, reorder
from .steps import Read, Ready, Rows, Sizes, Steps


def all_to_all_2d(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Exchange equal blocks with every rank of a mesh, by a hierarchical all-to-all (2DH); differentiable.

    Block w of x [W * r, ...] goes to rank w = node * locals + local. The result has the blocks of all ranks in their
    order, bit for bit as `all_to_all` over the W ranks gives them. On 2 x 2 ranks with r = 1::

        rank 0: a b c d   -> inside: a c to 0, b d to 1   rank 0 has  a e c g   -> between: a e to 0, c g to 2
        rank 1: e f g h   -> inside: e g to 0, f h to 1   rank 1 has  b f d h   -> between: b f to 1, d h to 3

    Args:
        x: [W * r, ...], the same shape and dtype on every rank.
        mesh: mesh with axes "node" and "local" in place of "ep". Its ranks ascend along them, node first.

    Returns:
        [W * r, ...], block w from rank w.

    Raises:
        ValueError: x does not divide into W equal blocks, or the mesh has other axes.
        DispatchError: an exchange failed.

    References:
        Tutel, Hwang et al. 2022, arXiv:2206.03382.

    Examples:
        On 4 ranks as 2 nodes of 2::

            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
            y = all_to_all_2d(x, mesh)  # x [4 * r, ...]
    """
    node, local = node_and_local(mesh)
    nodes, peers = dist.get_world_size(node), dist.get_world_size(local)
    if x.ndim == 0 or x.shape[0] % (nodes * peers):
        raise ValueError(f"x must be [{nodes * peers} * r, ...], an equal block for each rank; got {tuple(x.shape)}")
    (x,) = all_to_all(rearrange(x, "(n l r) ... -> (l n r) ...", n=nodes, l=peers), group=local)
    (x,) = all_to_all(rearrange(x, "(l n r) ... -> (n l r) ...", n=nodes, l=peers), group=node)
    return x


_Splits = tuple[list[int] | None, list[int] | None]  # rows to and from each rank of a group; None if blocks are equal
_Order = tuple[Tensor, Tensor]  # a permutation and its inverse, for `permute`


class _Sizes(NamedTuple):
    """Rows of each block before, between and after the two exchanges. Axis e is an expert of the destination rank."""

    leaving: Tensor  # [n, l, e] by destination, rows that this rank sends
    passing: Tensor  # [l, n, e] by source in this node and by destination node, rows that this rank forwards
    arriving: Tensor  # [n, l, e] by source, rows that this rank receives for its experts
    rows: tuple[int, int, int]  # the sums of these three, on the host
    inside: _Splits
    between: _Splits

    @classmethod
    def even(cls, leaving: Tensor, rows: int) -> _Sizes:
        """Sizes of a padded plan: all blocks are equal, so no rank needs to send its sizes."""
        passing = rearrange(leaving, "n l e -> l n e")
        return cls(leaving, passing, leaving, (rows, rows, rows), (None, None), (None, None))


class _Receipt(NamedTuple):
    plan: Plan  # with its rows in the order in which they are sent
    inside: _Splits
    between: _Splits
    middle: _Order  # from (source, destination node, expert), as rows arrive, to (destination node, source, expert)
    last: _Order  # from (source, expert), as rows arrive, to (expert, source), as experts get them


@dataclass(frozen=True)
class HierarchicalDispatcher(NodeLocalDispatcher):
    """Sends rows by a hierarchical all-to-all (2DH): inside the node first, then between nodes.

    Messages between nodes are fewer and larger than with `FlatDispatcher`. Experts get the same rows in the same order,
    so results and gradients are equal bit for bit. Sizes make both exchanges before any row, so a ragged plan costs one
    host sync.

    Args:
        node: ranks with this rank's local number, one in each node, in the order of nodes.
        local: ranks of this node. Rank (n, l) is rank n * len(local) + l of those that share the experts.
        equal_tokens: as in `FlatDispatcher`: True promises equal numbers of tokens, so that padded plans exchange no
            sizes; ``"check"`` raises if the promise is broken; False, the default, promises nothing.

    References:
        Tutel, Hwang et al. 2022, arXiv:2206.03382.

    Examples:
        On 4 ranks as 2 nodes of 2::

            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
            layer.dispatcher = HierarchicalDispatcher.of(mesh)
    """

    node: ProcessGroup
    local: ProcessGroup
    equal_tokens: bool | Literal["check"] = False

    def dispatch_steps(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        """Exchange sizes inside the node and between nodes, unless all are equal, then rows the same way."""
        return (self._dispatch_padded if self.is_static(plan) else self._dispatch_sized)(x, plan, weight)

    def _dispatch_sized(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        note = Note.tensor(x, weight, plan)
        equal = self.equal_tokens == "check" and not plan.follows_load
        sizes, capacity = yield from self._exchange_sizes(self._by_rank(plan.counts), note, plan.call, equal)
        if capacity is not None:
            return (yield from self._dispatch_padded(x, plan.padded(capacity), weight))
        return (yield from self._send_rows(x, plan, weight, sizes))

    def _dispatch_padded(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        return self._send_rows(x, plan, weight, _Sizes.even(self._by_rank(plan.counts), rows=plan.token.shape[0]))

    def combine_steps(self, rows: Tensor, receipt: _Receipt) -> Steps[Tensor]:
        """Send rows [R, D] back the same way and sum the rows of each token -> [T, D]."""
        (send_inside, recv_inside), (send, recv) = receipt.inside, receipt.between
        (rows,) = yield Rows((permute(rows, *receipt.last[::-1]),), recv, send, self.node)
        (rows,) = yield Rows((permute(rows, *receipt.middle[::-1]),), recv_inside, send_inside, self.local)
        return decode(rows, receipt.plan)

    def is_static(self, plan: Plan) -> bool:
        """Whether the plan is padded and equal tokens are promised."""
        return plan.has_equal_blocks(promised=self.equal_tokens is True)

    def refuse_steps(self, num_experts: int, device: torch.device) -> Steps[None]:
        """Send a refusal in place of sizes."""
        if self.equal_tokens is not True:  # a promise exchanges no sizes, so no rank would read the note
            nothing = torch.zeros(num_experts, dtype=torch.int64, device=device)
            yield from self._exchange_sizes(self._by_rank(nothing), Note.refusal(device))
        yield Ready()

    def _by_rank(self, counts: Tensor) -> Tensor:
        nodes, peers = self.shape
        return rearrange(counts, "(n l e) -> n l e", n=nodes, l=peers)

    def _exchange_sizes(
        self, leaving: Tensor, note: Tensor, call: LayerCall | None = None, equal: bool = False
    ) -> Steps[tuple[_Sizes, int | None]]:
        """Exchange sizes [n, l, e] and this rank's note, and check the notes of all ranks.

        Returns:
            Sizes of both exchanges, and the capacity that all ranks agree on.
        """
        nodes, peers = self.shape
        # Notes come first, so that they can be read even if another rank is in a layer of other sizes.
        notes = repeat(note, "i -> l i", l=peers)
        came = yield Sizes(torch.cat([notes, rearrange(leaving, "n l e -> l (n e)")], 1), self.local)
        notes, passing = came[:, :NOTE], rearrange(came[:, NOTE:], "l (n e) -> l n e", n=nodes)
        notes = repeat(notes, "l i -> n (l i)", n=nodes)
        came = yield Sizes(torch.cat([notes, rearrange(passing, "l n e -> n (l e)")], 1), self.node)
        notes, arriving = came.split([notes.shape[1], came.shape[1] - notes.shape[1]], 1)
        arriving = rearrange(arriving, "n (l e) -> n l e", l=peers)
        sums = leaving.sum((0, 2)), passing.sum((1, 2)), passing.sum((0, 2)), arriving.sum((1, 2))
        host = iter((yield Read(torch.cat([*sums, notes.flatten()]))))  # the one host sync
        to_local, from_local, to_node, from_node = (list(islice(host, len(s))) for s in sums)
        notes = [list(islice(host, NOTE)) for _ in range(nodes * peers)]
        capacity = agree(notes, call, equal)
        rows = sum(to_local), sum(from_local), sum(from_node)
        return _Sizes(leaving, passing, arriving, rows, (to_local, from_local), (to_node, from_node)), capacity

    def _send_rows(self, x: Tensor, plan: Plan, weight: Tensor, sizes: _Sizes) -> Steps[Batch]:
        leave, passed, arrived = sizes.rows
        yield Ready(sizes.arriving.sum((0, 1)), arrived, most=max(sizes.rows))
        first, _ = reorder(sizes.leaving, "n l e -> l n e", leave)
        plan = plan.reordered(first)  # `encode` then writes the send buffer, without another permutation
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
