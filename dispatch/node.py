"""Node-deduplicated all-to-all: a token crosses to a node once, is fanned out there, and comes back as one sum."""

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
from .place import Visit
from .plan import Plan, load
from .reorder import decode, encode, encode_weight
from .steps import Read, Ready, Rows, Sizes, Steps


def visits(expert: Tensor, nodes: int, held: int) -> Tensor:
    """The nodes each token goes to, each named once: int64 [T, k] experts, `held` a node -> [T, min(k, nodes)].

    Further places hold -1. To the step between nodes these are the "experts" of its plan.

    >>> visits(torch.tensor([[0, 5, 1], [7, -1, 6]]), nodes=2, held=4).tolist()
    [[1, 0], [1, -1]]
    """
    node = (expert // held).sort(1, descending=True).values  # -1 // held = -1: the dropped go nowhere
    again = node.diff(dim=1, prepend=torch.full_like(node[:, :1], nodes)) == 0
    return node.masked_fill(again, -1).sort(1, descending=True).values[:, :nodes]


def owned(expert: Tensor, node: int, held: int) -> Tensor:
    """Experts [R, k] by their number on `node`, which has `held` of them; those of other nodes -1.

    >>> owned(torch.tensor([[0, 5, 1], [7, -1, 6]]), node=1, held=4).tolist()
    [[-1, 1, -1], [3, -1, 2]]
    """
    return torch.where(expert // held == node, expert % held, -1)


class Leg(NamedTuple):
    """One step: rows as `plan` lays them out, exchanged over `group`; on the way back each token's rows are summed."""

    plan: Plan
    group: ProcessGroup
    send: list[int]  # rows to each rank of the group
    recv: list[int]

    def out(self, *tensors: Tensor) -> Rows:
        """Asks for what arrives of tensors laid out by `plan`."""
        return Rows(tensors, self.send, self.recv, self.group)

    def home(self, rows: Tensor) -> Steps[Tensor]:
        """Brings rows back to where they were laid out, and sums them there."""
        (rows,) = yield Rows((rows,), self.recv, self.send, self.group)
        return decode(rows, self.plan)


class _Receipt(NamedTuple):
    cross: Leg  # between nodes: one row for each (token, node)
    fan: Leg  # inside the node: one row for each assignment
    arrived: Plan  # by (source in the node, expert, source node) -> handed out by (expert, source rank)


class _Sizes(NamedTuple):
    cross: tuple[list[int], list[int]]  # send and recv splits between nodes
    fan: tuple[list[int], list[int]]  # and inside the node
    blocks: Tensor  # int64 [local, expert, node]: rows that come from each rank for each expert held here
    capacity: int | None  # agreed rows per (expert, source) of a padded plan, None if ragged
    k: int  # the largest k of all ranks

    @property
    def arriving(self) -> tuple[Tensor, int]:
        """Rows of each expert held here, and of all of them."""
        if self.capacity is None:
            return self.blocks.sum((0, 2)), sum(self.fan[1])
        padded = self.blocks.clamp(min=self.capacity).sum((0, 2))  # no block is larger
        return padded, self.blocks.numel() * self.capacity


@dataclass(frozen=True)
class NodeDispatcher(NodeLocalDispatcher):
    """A token crosses to a node once, however many of its experts live there.

    Where links between nodes are slower than those inside, what crosses is what costs. `FlatDispatcher`
    sends a row for each of a token's k experts; here (the idea of DeepEP,
    https://github.com/deepseek-ai/DeepEP, on plain collectives)::

        rank (n, l) --one row per (token, node n')--> rank (n', l) --one row per expert--> rank (n', l')
        rank (n, l) <--------one row, their sum------ rank (n', l) <-----weighted rows---- rank (n', l')

    The batch is that of `FlatDispatcher`, bit for bit; the results differ by rounding, because a token's
    rows are summed per node first. Both sums are in float32 or wider; a narrower sum is rounded to travel.
    One host sync, as there: the sizes of both steps go ahead together. A padded plan travels as a ragged
    one, without its empty rows, and the experts get their equal blocks.

    Args:
        node: the ranks with this one's place in their nodes, in the order of the nodes.
        local: the ranks of this node. Rank (n, l) is rank n * len(local) + l of those that share the experts.
    """

    node: ProcessGroup
    local: ProcessGroup

    def dispatch_steps(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        """Sizes of both steps; a row for each (token, node); a row for each expert."""
        nodes, peers = self.shape
        experts, k = plan.counts.numel(), plan.expert.shape[1]
        held = experts // nodes
        trip = Plan.of(visits(plan.expert, nodes, held), nodes)
        note = Note.tensor(x, weight, plan)
        sizes = yield from self._exchange_sizes(trip.counts, load(plan.expert, experts), note, k, plan.visit)
        yield Ready(*sizes.arriving)

        cross = Leg(trip.trimmed(sum(sizes.cross[0])), self.node, *sizes.cross)
        expert, weight = pad(plan.expert, (0, sizes.k - k), value=-1), pad(weight, (0, sizes.k - k))
        # The experts' numbers go by themselves: beside the rows, zeros for them would travel in the backward.
        (expert,) = yield cross.out(expert[cross.plan.token].int())
        rows, weight = yield cross.out(encode(x, cross.plan), encode(weight, cross.plan))

        inside = Plan.of(owned(expert.long(), dist.get_rank(self.node), held), held)
        fan = Leg(inside.trimmed(sum(sizes.fan[0])), self.local, *sizes.fan)
        rows, weight = yield fan.out(encode(rows, fan.plan), encode_weight(weight, fan.plan))

        blocks = nodes * held  # one for each expert of this rank and each rank that sends to it
        block = rearrange(torch.arange(blocks, device=x.device), "(e n l) -> (l e n)", n=nodes, l=peers)
        block = torch.repeat_interleave(block, sizes.blocks.flatten(), output_size=len(rows))
        arrived = Plan.of(block.unsqueeze(1), blocks, sizes.capacity)
        counts = reduce(arrived.counts, "(e w) -> e", "sum", w=nodes * peers)
        weight = encode_weight(weight.unsqueeze(1), arrived)
        return Batch(encode(rows, arrived), weight, counts, _Receipt(cross, fan, arrived))

    def combine_steps(self, rows: Tensor, receipt: _Receipt) -> Steps[Tensor]:
        """Rows [R, D] back to where they came from, summed in their node and then at home -> [T, D]."""
        rows = yield from receipt.fan.home(decode(rows, receipt.arrived))
        return (yield from receipt.cross.home(rows))

    def refuse_steps(self, num_experts: int, device: torch.device) -> Steps[None]:
        """A note of refusal in place of sizes."""
        nothing = torch.zeros(self.shape[0] + num_experts, dtype=torch.int64, device=device)
        yield from self._exchange_sizes(nothing[num_experts:], nothing[:num_experts], Note.refusal(device), 0)
        yield Ready()

    def _exchange_sizes(
        self, rows: Tensor, loads: Tensor, note: Tensor, k: int, visit: Visit | None = None
    ) -> Steps[_Sizes]:
        """rows int64 [N] to each node, loads int64 [E] to each expert, and this rank's note.

        They go the way the rows will go, so that every rank knows its part of both steps and has read the
        notes of all ranks after one look at the device.
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
        capacity, k = agree([line[:NOTE] for line in every], visit), max(line[NOTE] for line in every)
        blocks = rearrange(blocks, "l n e -> l e n")
        return _Sizes((send, recv), (send_inside, recv_inside), blocks, capacity, k)
