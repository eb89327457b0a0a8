"""Node-deduplicated all-to-all: each token is sent once to each node, however many of its experts are there."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from .agreement import NOTE, Note, agree
from .dispatcher import Batch, NodeLocalDispatcher
from .place import LayerCall
from .plan import Plan, load
from .reorder import decode, encode, encode_weight
from .steps import Read, Ready, Rows, Sizes, Steps


def distinct_nodes(expert: Tensor, nodes: int, per_node: int) -> Tensor:
    """Destination nodes of each token, each listed once: experts int64 [T, k] -> nodes [T, min(k, nodes)], -1 = none.

    They are the "experts" of the plan for the exchange between nodes. Each node has `per_node` experts.

    >>> distinct_nodes(torch.tensor([[0, 5, 1], [7, -1, 6]]), nodes=2, per_node=4).tolist()
    [[1, 0], [1, -1]]
    """
    node = (expert // per_node).sort(1, descending=True).values  # -1 // per_node = -1: still dropped
    again = node.diff(dim=1, prepend=torch.full_like(node[:, :1], nodes)) == 0
    return node.masked_fill(again, -1).sort(1, descending=True).values[:, :nodes]


def numbers_on_node(expert: Tensor, node: int, per_node: int) -> Tensor:
    """Number on its node of each expert in [R, k], with `per_node` experts per node; -1 for experts of other nodes.

    >>> numbers_on_node(torch.tensor([[0, 5, 1], [7, -1, 6]]), node=1, per_node=4).tolist()
    [[-1, 1, -1], [3, -1, 2]]
    """
    return torch.where(expert // per_node == node, expert % per_node, -1)


class Hop(NamedTuple):
    """One of several exchanges that make up a dispatch, with the plan of its rows."""

    plan: Plan
    group: ProcessGroup
    send: list[int]  # rows to each rank of the group
    recv: list[int]

    def dispatch(self, *tensors: Tensor) -> Rows:
        """Request to send tensors that are permuted by `plan` already."""
        return Rows(tensors, self.send, self.recv, self.group)

    def combine(self, rows: Tensor) -> Steps[Tensor]:
        """Send rows back, and sum the rows of each token of `plan`."""
        (rows,) = yield Rows((rows,), self.recv, self.send, self.group)
        return decode(rows, self.plan)


class _Receipt(NamedTuple):
    between: Hop  # between nodes: one row for each (token, node)
    inside: Hop  # inside the node: one row for each assignment
    arrived: Plan  # from (source in the node, expert, source node), as rows arrive, to (expert, source rank)


class _Sizes(NamedTuple):
    between: tuple[list[int], list[int]]  # send and recv between nodes
    inside: tuple[list[int], list[int]]  # send and recv inside the node
    blocks: Tensor  # int64 [local, expert, node]: rows from each source rank for each expert of this rank
    capacity: int | None  # rows per (expert, source rank) of a padded plan, None if ragged
    k: int  # the largest k of all ranks

    @property
    def arriving(self) -> tuple[Tensor, int]:
        """Rows of each expert of this rank, and their sum."""
        if self.capacity is None:
            return self.blocks.sum((0, 2)), sum(self.inside[1])
        padded = self.blocks.clamp(min=self.capacity).sum((0, 2))  # no block exceeds the capacity
        return padded, self.blocks.numel() * self.capacity


@dataclass(frozen=True)
class NodeDispatcher(NodeLocalDispatcher):
    """Sends a token once to each node, however many of its experts are there.

    Use it if links between nodes are slower than links inside them. `FlatDispatcher` sends one row for each of a
    token's k experts. This dispatcher sends one row for each of its nodes, and the receiving rank sends it on to the
    experts::

        rank (n, l) --one row per (token, node n')--> rank (n', l) --one row per expert--> rank (n', l')
        rank (n, l) <--------one row, their sum------ rank (n', l) <-----weighted rows---- rank (n', l')

    Experts get the same batch as with `FlatDispatcher`, bit for bit. Results differ by rounding, because a token's rows
    are summed on each node first. Both sums are in float32 or wider. In a narrower dtype, the sum of a node is rounded
    before it is sent. There is one host sync, because the sizes of both exchanges go ahead of all rows. The rows of a
    padded plan are sent without its empty rows, and padded again for the experts.

    Args:
        node: ranks with this rank's local number, one in each node, in the order of nodes.
        local: ranks of this node. Rank (n, l) is rank n * len(local) + l of those that share the experts.

    References:
        DeepEP, https://github.com/deepseek-ai/DeepEP, which has the idea. Here it runs on plain collectives.

    Examples:
        On 4 ranks as 2 nodes of 2::

            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
            layer.dispatcher = NodeDispatcher.of(mesh)
    """

    node: ProcessGroup
    local: ProcessGroup

    def dispatch_steps(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        """Exchange the sizes of both exchanges, then a row for each (token, node), then a row for each expert."""
        nodes, peers = self.shape
        experts, k = plan.counts.numel(), plan.expert.shape[1]
        per_node = experts // nodes
        to_nodes = Plan.of(distinct_nodes(plan.expert, nodes, per_node), nodes)
        note = Note.tensor(x, weight, plan)
        sizes = yield from self._exchange_sizes(to_nodes.counts, load(plan.expert, experts), note, k, plan.call)
        yield Ready(*sizes.arriving)

        between = Hop(to_nodes.trimmed(sum(sizes.between[0])), self.node, *sizes.between)
        expert, weight = pad(plan.expert, (0, sizes.k - k), value=-1), pad(weight, (0, sizes.k - k))
        # Expert ids have an exchange of their own. Next to the rows, their zero gradients would be sent as well.
        (expert,) = yield between.dispatch(expert[between.plan.token].int())
        rows, weight = yield between.dispatch(encode(x, between.plan), encode(weight, between.plan))

        to_experts = Plan.of(numbers_on_node(expert.long(), dist.get_rank(self.node), per_node), per_node)
        inside = Hop(to_experts.trimmed(sum(sizes.inside[0])), self.local, *sizes.inside)
        rows, weight = yield inside.dispatch(encode(rows, inside.plan), encode_weight(weight, inside.plan))

        blocks = nodes * per_node  # one for each expert of this rank and each source rank
        block = rearrange(torch.arange(blocks, device=x.device), "(e n l) -> (l e n)", n=nodes, l=peers)
        block = torch.repeat_interleave(block, sizes.blocks.flatten(), output_size=len(rows))
        arrived = Plan.of(block.unsqueeze(1), blocks, sizes.capacity)
        counts = reduce(arrived.counts, "(e w) -> e", "sum", w=nodes * peers)
        weight = encode_weight(weight.unsqueeze(1), arrived)
        return Batch(encode(rows, arrived), weight, counts, _Receipt(between, inside, arrived))

    def combine_steps(self, rows: Tensor, receipt: _Receipt) -> Steps[Tensor]:
        """Send rows [R, D] back, and sum the rows of each token on each node and then on its own rank -> [T, D]."""
        rows = yield from receipt.inside.combine(decode(rows, receipt.arrived))
        return (yield from receipt.between.combine(rows))

    def refuse_steps(self, num_experts: int, device: torch.device) -> Steps[None]:
        """Send a refusal in place of sizes."""
        nothing = torch.zeros(self.shape[0] + num_experts, dtype=torch.int64, device=device)
        yield from self._exchange_sizes(nothing[num_experts:], nothing[:num_experts], Note.refusal(device), 0)
        yield Ready()

    def _exchange_sizes(
        self, rows: Tensor, loads: Tensor, note: Tensor, k: int, call: LayerCall | None = None
    ) -> Steps[_Sizes]:
        """Exchange the sizes of both exchanges, and check the notes of all ranks, with one host sync.

        They go the same way as the rows. Afterwards every rank knows its sizes in both exchanges.

        Args:
            rows: int64 [N], rows to each node.
            loads: int64 [E], rows to each expert.
            note: note of this rank.
            k: experts of each token on this rank; ranks may differ in it.
            call: the forward it belongs to, if there is a `Place`.
        """
        nodes, peers = self.shape
        loads = rearrange(loads, "(n l e) -> n (l e)", n=nodes, l=peers)
        notes = repeat(torch.cat([note, note.new_full((1,), k)]), "a -> n a", n=nodes)
        came = yield Sizes(torch.cat([notes, rows.unsqueeze(1), loads], 1), self.node)
        notes, arriving, loads = came.split([NOTE + 1, 1, loads.shape[1]], 1)
        loads = rearrange(loads, "n (l e) -> l n e", l=peers)
        notes = repeat(notes, "n a -> l (n a)", l=peers)
        came = yield Sizes(torch.cat([notes, rearrange(loads, "l n e -> l (n e)")], 1), self.local)
        notes, blocks = came.split([notes.shape[1], came.shape[1] - notes.shape[1]], 1)
        notes = rearrange(notes, "l (n a) -> (n l a)", n=nodes)
        blocks = rearrange(blocks, "l (n e) -> l n e", n=nodes)

        splits = rows, arriving.flatten(), loads.sum((1, 2)), blocks.sum((1, 2))
        host = iter((yield Read(torch.cat([*splits, notes]))))  # the one host sync
        send, recv, send_inside, recv_inside = ([*islice(host, len(s))] for s in splits)
        every = [[*islice(host, NOTE + 1)] for _ in range(nodes * peers)]
        capacity, k = agree([line[:NOTE] for line in every], call), max(line[NOTE] for line in every)
        blocks = rearrange(blocks, "l n e -> l e n")
        return _Sizes((send, recv), (send_inside, recv_inside), blocks, capacity, k)
