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
from .row_blocks import shares
from .steps import Read, Ready, Rows, Sizes, Steps, interleaved

PIECES = 4  # pieces that "auto" may choose
PIECE = 2**14  # bytes of a piece to each node, at least: below, messages cost more than the overlap of links saves


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


class _Piece(NamedTuple):
    between: Hop  # between nodes: one row for each (token, node)
    inside: Hop  # inside the node: one row for each assignment


class _Receipt(NamedTuple):
    pieces: list[_Piece]
    arrived: Plan  # from (piece, source in the node, expert, source node), as rows arrive, to (expert, source rank)


class _Sizes(NamedTuple):
    between: list[tuple[list[int], list[int]]]  # send and recv between nodes, of each piece
    inside: list[tuple[list[int], list[int]]]  # send and recv inside the node, of each piece
    blocks: Tensor  # int64 [piece, local, expert, node]: rows from each source rank for each expert of this rank
    capacity: int | None  # rows per (expert, source rank) of a padded plan, None if ragged
    k: int  # the largest k of all ranks

    @property
    def most(self) -> int:
        """The largest number of rows that this rank sends or receives in one of the two exchanges."""
        return max(sum(map(sum, rows)) for splits in (self.between, self.inside) for rows in zip(*splits, strict=True))

    @property
    def arriving(self) -> tuple[Tensor, int]:
        """Rows of each expert of this rank, and their sum."""
        blocks = self.blocks.sum(0)
        if self.capacity is None:
            return blocks.sum((0, 2)), sum(sum(recv) for _, recv in self.inside)
        padded = blocks.clamp(min=self.capacity).sum((0, 2))  # no block exceeds the capacity
        return padded, blocks.numel() * self.capacity


@dataclass(frozen=True)
class NodeDispatcher(NodeLocalDispatcher):
    """Sends a token once to each node, however many of its experts are there.

    Use it if links between nodes are slower than links inside them. `FlatDispatcher` sends one row for each of a
    token's k experts. This dispatcher sends one row for each of its nodes, and the receiving rank sends it on to the
    experts::

        rank (n, l) --one row per (token, node n')--> rank (n', l) --one row per expert--> rank (n', l')
        rank (n, l) <--------one row, their sum------ rank (n', l) <-----weighted rows---- rank (n', l')

    With ``pieces=4`` tokens travel in up to 4 pieces, so that neither link waits for the other: while one piece is sent
    on inside the node, the next one travels between nodes. The way back and the backward do the same. Small batches
    take fewer pieces. It pays where the link between nodes is the limit, and costs time where messages are.

    Experts get the same batch as with `FlatDispatcher`, bit for bit. Results differ by rounding, because a token's rows
    are summed on each node first. Both sums are in float32 or wider. In a narrower dtype, the sum of a node is rounded
    before it is sent. The number of pieces changes no bit. There is one host sync, because the sizes of both exchanges
    go ahead of all rows. The rows of a padded plan are sent without its empty rows, and padded again for the experts.

    Args:
        node: ranks with this rank's local number, one in each node, in the order of nodes.
        local: ranks of this node. Rank (n, l) is rank n * len(local) + l of those that share the experts.
        pieces: the most pieces, 1 by default, the same on all ranks. Their number is the largest divisor of `pieces`
            with which the rank that sends most still sends `PIECE` bytes of a piece to each node.

    Raises:
        ValueError: `pieces` is no positive integer.

    References:
        DeepEP, https://github.com/deepseek-ai/DeepEP, which has the idea. Here it runs on plain collectives.

    Examples:
        On 4 ranks as 2 nodes of 2::

            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
            layer.dispatcher = NodeDispatcher.of(mesh)
    """

    node: ProcessGroup
    local: ProcessGroup
    pieces: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.pieces, int) or self.pieces < 1:
            raise ValueError(f"pieces must be a positive integer; got {self.pieces!r}")

    def dispatch_steps(self, x: Tensor, plan: Plan, weight: Tensor) -> Steps[Batch]:
        """Exchange the sizes of both exchanges, then a row for each (token, node), then a row for each expert."""
        nodes, peers = self.shape
        experts, k = plan.counts.numel(), plan.expert.shape[1]
        per_node, row = experts // nodes, x.shape[1] * x.element_size()
        to_nodes = distinct_nodes(plan.expert, nodes, per_node)
        note = Note.tensor(x, weight, plan)
        rows, loads = self._loads(to_nodes, nodes), self._loads(plan.expert, experts)
        sizes = yield from self._exchange_sizes(rows, loads, note, k, row, plan.call)
        yield Ready(*sizes.arriving, sizes.most)

        expert, weight = pad(plan.expert, (0, sizes.k - k), value=-1), pad(weight, (0, sizes.k - k))
        cut = shares(len(x), len(sizes.between))
        tokens = (t.split(cut) for t in (x, weight, expert, to_nodes))
        pieces = zip(*tokens, sizes.between, sizes.inside, strict=True)
        came = yield from interleaved([self._send(per_node, *piece) for piece in pieces])
        rows, weight = _joined([rows for rows, _, _ in came]), _joined([weight for _, weight, _ in came])

        blocks = nodes * per_node  # one for each expert of this rank and each source rank
        block = rearrange(torch.arange(blocks, device=x.device), "(e n l) -> (l e n)", n=nodes, l=peers)
        block = torch.repeat_interleave(block.repeat(len(came)), sizes.blocks.flatten(), output_size=len(rows))
        arrived = Plan.of(block.unsqueeze(1), blocks, sizes.capacity)
        counts = reduce(arrived.counts, "(e w) -> e", "sum", w=nodes * peers)
        weight = encode_weight(weight.unsqueeze(1), arrived)
        return Batch(encode(rows, arrived), weight, counts, _Receipt([piece for _, _, piece in came], arrived))

    def _loads(self, ids: Tensor, number: int) -> Tensor:
        """Load of each node or expert by each piece: ids int64 [T, k] -> [pieces * number], for the most pieces."""
        token = torch.arange(len(ids), device=ids.device).unsqueeze(1)
        piece = ((token + 1) * self._most - 1) // max(len(ids), 1)  # as `shares` cuts them
        return load(torch.where(ids < 0, -1, ids + piece * number), self._most * number)

    def _send(
        self,
        per_node: int,
        x: Tensor,
        weight: Tensor,
        expert: Tensor,
        to_nodes: Tensor,
        between: tuple[list[int], list[int]],
        inside: tuple[list[int], list[int]],
    ) -> Steps[tuple[Tensor, Tensor, _Piece]]:
        """Send the tokens of one piece through both exchanges: rows and weights as they arrive."""
        first = Hop(Plan.of(to_nodes, self.shape[0]).trimmed(sum(between[0])), self.node, *between)
        # Expert ids have an exchange of their own. Next to the rows, their zero gradients would be sent as well.
        ids = yield first.dispatch(expert[first.plan.token].int())._replace(at_once=True)
        both = yield first.dispatch(encode(x, first.plan), encode(weight, first.plan))._replace(at_once=True)
        (expert,) = yield ids
        plan = Plan.of(numbers_on_node(expert.long(), dist.get_rank(self.node), per_node), per_node)
        second = Hop(plan.trimmed(sum(inside[0])), self.local, *inside)
        rows, weight = yield both
        rows, weight = yield second.dispatch(encode(rows, second.plan), encode_weight(weight, second.plan))
        return rows, weight, _Piece(first, second)

    def combine_steps(self, rows: Tensor, receipt: _Receipt) -> Steps[Tensor]:
        """Send rows [R, D] back, and sum the rows of each token on each node and then on its own rank -> [T, D]."""
        rows = decode(rows, receipt.arrived)
        parts = rows.split([sum(piece.inside.recv) for piece in receipt.pieces])
        sums = yield from interleaved(
            [self._send_back(part, piece) for part, piece in zip(parts, receipt.pieces, strict=True)]
        )
        return _joined(sums)

    def _send_back(self, rows: Tensor, piece: _Piece) -> Steps[Tensor]:
        rows = yield from piece.inside.combine(rows)
        return (yield from piece.between.combine(rows))

    def refuse_steps(self, num_experts: int, device: torch.device) -> Steps[None]:
        """Send a refusal in place of sizes."""
        nothing = torch.zeros(self._most * (self.shape[0] + num_experts), dtype=torch.int64, device=device)
        rows, loads = nothing.split([self._most * self.shape[0], self._most * num_experts])
        yield from self._exchange_sizes(rows, loads, Note.refusal(device), 0, 0)
        yield Ready()

    @property
    def _most(self) -> int:
        """The most pieces. There is one if nothing travels between nodes, or nothing inside them."""
        return 1 if 1 in self.shape else self.pieces

    def _exchange_sizes(
        self, rows: Tensor, loads: Tensor, note: Tensor, k: int, row: int, call: LayerCall | None = None
    ) -> Steps[_Sizes]:
        """Exchange the sizes of both exchanges, and check the notes of all ranks, with one host sync.

        They go the same way as the rows. Afterwards every rank knows its sizes in both exchanges, and all know in how
        many pieces the rows go. Sizes are exchanged for the largest number of
        pieces, `p`; sums of them are sizes for fewer pieces.

        Args:
            rows: int64 [p * N], rows to each node.
            loads: int64 [p * E], rows to each expert.
            note: note of this rank.
            k: experts of each token on this rank; ranks may differ in it.
            row: bytes of a row.
            call: the forward it belongs to, if there is a `Place`.
        """
        (nodes, peers), p = self.shape, self._most
        own = torch.stack([torch.full_like(rows[0], k), rows.sum() * row])
        rows = rearrange(rows, "(p n) -> n p", p=p)
        loads = rearrange(loads, "(p n l e) -> n (p l e)", p=p, n=nodes, l=peers)
        notes = repeat(torch.cat([note, own]), "a -> n a", n=nodes)
        came = yield Sizes(torch.cat([notes, rows, loads], 1), self.node)
        notes, arriving, loads = came.split([NOTE + 2, p, loads.shape[1]], 1)
        loads = rearrange(loads, "n (p l e) -> l p n e", p=p, l=peers)
        notes = repeat(notes, "n a -> l (n a)", l=peers)
        came = yield Sizes(torch.cat([notes, rearrange(loads, "l p n e -> l (p n e)")], 1), self.local)
        notes, blocks = came.split([notes.shape[1], came.shape[1] - notes.shape[1]], 1)
        notes = rearrange(notes, "l (n a) -> (n l) a", n=nodes)
        blocks = rearrange(blocks, "l (p n e) -> p l e n", p=p, n=nodes)

        splits = rows.T, arriving.T, loads.sum((2, 3)).T, blocks.sum((2, 3))  # [p, ranks of the group]
        host = iter((yield Read(torch.cat([*(s.flatten() for s in splits), notes.flatten()]))))  # the one host sync
        tables = [[[*islice(host, s.shape[1])] for _ in range(p)] for s in splits]
        every = [[*islice(host, NOTE + 2)] for _ in range(nodes * peers)]
        capacity, k = agree([line[:NOTE] for line in every], call), max(line[NOTE] for line in every)
        pieces = self._pieces(max(line[NOTE + 1] for line in every))
        send, recv, send_inside, recv_inside = (_merged(table, pieces) for table in tables)
        between, inside = [*zip(send, recv, strict=True)], [*zip(send_inside, recv_inside, strict=True)]
        blocks = reduce(blocks, "(pieces p) l e n -> pieces l e n", "sum", pieces=pieces)
        return _Sizes(between, inside, blocks, capacity, k)

    def _pieces(self, bytes: int) -> int:
        """Number of pieces for the bytes of rows that the rank with most of them sends to all nodes."""
        fitting = bytes // (self.shape[0] * PIECE)
        return max(n for n in range(1, self._most + 1) if self._most % n == 0 and n <= max(fitting, 1))


def _merged(table: list[list[int]], pieces: int) -> list[list[int]]:
    """Rows to each rank in fewer pieces.

    >>> _merged([[1, 0], [2, 5], [3, 0], [4, 1]], 2)
    [[3, 5], [7, 1]]
    """
    each = len(table) // pieces
    return [[sum(rows) for rows in zip(*table[i * each : (i + 1) * each], strict=True)] for i in range(pieces)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
