"""The collectives everything else is made of. No other file of the package exchanges tokens."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .agreement import DispatchError
from .failure import named, timeout_of
from .place import Visit
from .traced import Arrived, exchange
from .wire import Wire, pack, unpack


def all_to_all(
    *tensors: Tensor,
    send: list[int] | None = None,
    recv: list[int] | None = None,
    group: ProcessGroup | None,
    wire: Wire | None = None,
) -> tuple[Tensor, ...]:
    """Rows to every rank of a group, rows from every rank; differentiable.

    Each tensor [sum(send), ...] is cut into W blocks, block w going to rank w; what comes back
    [sum(recv), ...] lies in the order of the source ranks. All tensors share the splits and travel at
    the same time. Blocks may be empty. With two ranks, ``send`` = [1, 2] on rank 0 and [1, 0] on rank 1::

        rank 0: a | b c   -> to 0: a, to 1: b c          rank 0 has  a d     recv = [1, 1]
        rank 1: d |       -> to 0: d, to 1: nothing      rank 1 has  b c     recv = [2, 0]

    Args:
        tensors: same number of rows, any trailing shape and dtype, the same on all ranks.
        send, recv: rows to and from each rank. They must agree between ranks (`exchange_sizes`): a
            collective cannot check (`check_sizes` can). Leave both out for equal blocks.
        group: the ranks; None is the default group. The backward runs on the same group.
        wire: how the first tensor travels, [R, D] if it is floating; None: as it is. Its gradient then travels
            in bfloat16 (`wire.pack`).
    """
    return all_to_all_start(*tensors, send=send, recv=recv, group=group, wire=wire).wait()


class Travel(NamedTuple):
    """An exchange under way: see `all_to_all_start`."""

    leg: _Leg
    ticket: Tensor

    def wait(self) -> tuple[Tensor, ...]:
        """What came; call it once, and on every rank that needs a gradient."""
        return _Wait.apply(self.leg, self.ticket)  # pyright: ignore[reportReturnType]


def all_to_all_start(
    *tensors: Tensor,
    send: list[int] | None = None,
    recv: list[int] | None = None,
    group: ProcessGroup | None,
    wire: Wire | None = None,
    visit: Visit | None = None,
) -> Travel | Arrived:
    """`all_to_all` in two halves, for what can be computed in between; differentiable.

    In the backward the halves change roles: the gradients start where the forward waited and are waited for
    where it started. So what ran between the two forward runs its own backward between them, too::

        forward     start ..... compute ..... wait
        backward     wait ..... compute ..... start

    On a GPU nothing blocks the host: the exchange has a stream of its own (NCCL's), which waits for what was
    queued before the start; `wait` makes the current stream wait for it.

    Args:
        tensors, send, recv, group, wire: as in `all_to_all`.
        visit: the forward it belongs to. Errors name it, and on a CPU its gradients never meet those of another one:
            see `_Messages`.
    """
    wire = wire if tensors[0].is_floating_point() else None
    if torch.compiler.is_compiling():
        return exchange(tensors, send, recv, group, wire)
    leg = _Leg(send, recv, group, wire, tensors[0].dtype, visit)
    return Travel(leg, _Start.apply(leg, *tensors))  # pyright: ignore[reportArgumentType]


@dataclass
class _Leg:
    """What the two halves of one exchange share. It never holds the ticket: the graph would hold itself."""

    send: list[int] | None
    recv: list[int] | None
    group: ProcessGroup | None
    wire: Wire | None  # of the first tensor
    dtype: torch.dtype  # the first tensor's
    visit: Visit | None = None
    backward: bool = False
    arriving: list[tuple[Tensor, dist.Work | _Messages]] = field(default_factory=list)  # from start to wait
    back: _Leg | None = None  # that of the gradients, from wait to start

    def start(self, tensor: Tensor) -> tuple[Tensor, dist.Work | _Messages]:
        tensor = tensor.contiguous()
        out = tensor.new_empty(tensor.shape[0] if self.recv is None else sum(self.recv), *tensor.shape[1:])
        if self.backward and self.visit is not None and tensor.device.type == "cpu":
            return out, _Messages(out, self.recv, tensor, self.send, self.group, self.visit.tag)
        work = dist.all_to_all_single(out, tensor, self.recv, self.send, group=self.group, async_op=True)
        assert work is not None, "this rank is not in the group"
        return out, work

    def named(self) -> AbstractContextManager[None]:
        """An error on the wire tells where it happened."""
        return named("gradients of rows" if self.backward else "rows", self.group, self.visit)

    def turned(self) -> _Leg:
        """The way back: the splits exchanged, and the same group."""
        return _Leg(self.recv, self.send, self.group, self.wire and "bf16", self.dtype, self.visit, not self.backward)


class _Messages:
    """An all-to-all in messages that are marked, so that they meet no others.

    Ranks agree on a forward before its rows travel, but autograd decides when the backward comes: a rank whose loss
    leaves a layer out would send another layer's gradients. gloo pairs the exchanges of a group in the order in
    which they come, takes a message that is too short without a word, and ends the process on one that is too long.
    Marked messages wait for their own instead, and the error after the group's timeout says where each rank is.
    Backwards alone pay for it: 8 ranks on 2 cores need 1.5 times as long for small messages, 2 ranks as long as before.
    """

    def __init__(self, out: Tensor, recv, x: Tensor, send, group: ProcessGroup | None, tag: int) -> None:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        outs, ins = (t.split([t.shape[0] // ranks] * ranks if n is None else n) for t, n in ((out, recv), (x, send)))
        outs[rank].copy_(ins[rank])
        self.group, self.works = group, []
        for step in range(1, ranks):  # every rank begins with another one
            source, target = (rank - step) % ranks, (rank + step) % ranks
            if outs[source].numel():
                self.works.append(dist.irecv(outs[source], group=group, group_src=source, tag=tag))
            if ins[target].numel():
                self.works.append(dist.isend(ins[target], group=group, group_dst=target, tag=tag))

    def wait(self) -> None:
        limit = timeout_of(self.group)  # these do not know it by themselves (torch 2.13)
        for work in self.works:
            work.wait(limit)


class _Start(torch.autograd.Function):
    """Tensors -> a ticket: a tensor without elements, by which autograd knows that `_Wait` comes after."""

    @staticmethod
    def forward(ctx, leg, *tensors):
        ctx.leg = leg
        packed = tensors if leg.wire is None else (pack(tensors[0], leg.wire), *tensors[1:])
        with leg.named():
            leg.arriving = [leg.start(t) for t in packed]
        return tensors[0].new_empty(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *_Wait.apply(ctx.leg.back, grad)  # pyright: ignore[reportGeneralTypeIssues]


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, leg, ticket):
        ctx.leg, arriving, leg.arriving = leg, leg.arriving, []
        assert arriving, "waited for twice"
        with leg.named():
            for _, work in arriving:
                work.wait()
        out = tuple(t for t, _ in arriving)
        if leg.wire is not None:
            out = (unpack(out[0], leg.wire, leg.dtype), *out[1:])
        ctx.mark_non_differentiable(*(t for t in out if not t.is_floating_point()))
        return out

    @staticmethod
    def backward(ctx, *grads):
        # All gradients travel, zeros too: which of them are needed may differ between ranks, the collectives may not.
        ctx.leg.back = ctx.leg.turned()
        return None, _Start.apply(ctx.leg.back, *grads)


def exchange_sizes(sizes: Tensor, group: ProcessGroup | None, visit: Visit | None = None) -> Tensor:
    """First phase: sizes int64 [W, ...] for each rank -> [W, ...] from each rank. Not differentiable.

    ::

        rank 0: [1, 2]   -> to 0: 1, to 1: 2             rank 0 has  [1, 1]
        rank 1: [1, 0]   -> to 0: 1, to 1: 0             rank 1 has  [2, 0]

    What travels is filled up to a length that other layers of the model have, too, so that ranks that are in different
    layers can still read each other's notes. `visit`: the forward it belongs to, for errors.
    """
    flat = sizes.reshape(len(sizes), -1)
    numbers = max(flat.shape[1], 64 + visit.place.widest if visit is not None and visit.place.widest else 64)
    sent = flat.new_zeros(len(flat), 1 << (numbers - 1).bit_length())
    sent[:, : flat.shape[1]] = flat
    came = torch.empty_like(sent)
    with named("sizes", group, visit):
        dist.all_to_all_single(came, sent, group=group)
    return came[:, : flat.shape[1]].reshape(sizes.shape)


def check_sizes(send: list[int], recv: list[int], group: ProcessGroup | None) -> None:
    """Do all ranks expect what the others send? For `all_to_all` with sizes that were not exchanged.

    gloo takes a message that is too short without a word, and one that is too long kills the process it reaches.
    This costs one small exchange; `send` and `recv` are as in `all_to_all`.

    Raises:
        DispatchError: with the same text on every rank, naming two that disagree.
    """
    ranks = dist.get_world_size(group)
    table = exchange_sizes(torch.tensor([[send, recv]]).expand(ranks, 2, ranks), group).tolist()
    for w, (sends, _) in enumerate(table):
        for v, (_, expects) in enumerate(table):
            if sends[v] != expects[w]:
                raise DispatchError(
                    f"rank {w} of the group sends {sends[v]} rows to rank {v}, which expects {expects[w]}; "
                    "take `recv` from `exchange_sizes`"
                )


def all_to_all_two_phase(
    *tensors: Tensor, send: list[int], group: ProcessGroup | None
) -> tuple[tuple[Tensor, ...], list[int]]:
    """`all_to_all` where a rank knows only what it sends: sizes first, then the rows. One host sync.

    Args:
        tensors, send, group: as in `all_to_all`.

    Returns:
        The tensors that came, and ``recv``, the rows from each rank: the ``send`` of the way back::

            rank 0: a | b c   1. sizes    to 0: 1, to 1: 2      rank 0 has  [1, 1]
            rank 1: d |                   to 0: 1, to 1: 0      rank 1 has  [2, 0]
                              2. payload  to 0: a, to 1: b c    rank 0 has  a d
                                          to 0: d               rank 1 has  b c
    """
    recv = exchange_sizes(torch.tensor(send, device=tensors[0].device), group).tolist()
    return all_to_all(*tensors, send=send, recv=recv, group=group), recv


def scatter(x: Tensor, sizes: list[int], root: int, group: ProcessGroup | None) -> Tensor:
    """One rank's rows, cut into a piece for each: x [sum(sizes), ...] on the root -> [sizes[w], ...] on rank w.

    The all-to-all in which only the root has rows. With root 0 and ``sizes`` = [1, 2]::

        rank 0: a | b c   -> to 0: a, to 1: b c          rank 0 has  a
        rank 1:           -> nothing                     rank 1 has  b c

    Its backward is `gather`. That is a collective, too: either x requires a gradient on all ranks or on none.

    Args:
        x: on ranks other than the root [0, ...], of the same trailing shape and dtype.
        sizes: rows for each rank, the same on all ranks; pieces may be empty.
        root: its rank in the group.
        group: the ranks; None is the default group.
    """
    send, recv = _one_sided(sizes, root, group)
    _check_rows(x, sum(send), "scatter")
    return all_to_all(x, send=send, recv=recv, group=group)[0]


def gather(x: Tensor, sizes: list[int], root: int, group: ProcessGroup | None) -> Tensor:
    """Everybody's rows to one rank: x [sizes[w], ...] on rank w -> [sum(sizes), ...] on the root, [0, ...] elsewhere.

    The all-to-all in which only the root gets rows. With root 0 and ``sizes`` = [1, 2]::

        rank 0: a         -> to 0: a                     rank 0 has  a b c
        rank 1: b c       -> to 0: b c                   rank 1 has  nothing

    Its backward is `scatter`: ranks other than the root call backward through their empty result.

    Args:
        x, root, group: as in `scatter`.
        sizes: rows of each rank, the same on all ranks; pieces may be empty.
    """
    recv, send = _one_sided(sizes, root, group)
    _check_rows(x, sum(send), "gather")
    return all_to_all(x, send=send, recv=recv, group=group)[0]


def _one_sided(sizes: list[int], root: int, group: ProcessGroup | None) -> tuple[list[int], list[int]]:
    """Rows to each rank and from each rank in a scatter; in a gather they are from and to."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if len(sizes) != ranks or not 0 <= root < ranks:
        raise ValueError(f"sizes must have a number for each of {ranks} ranks, root be one; got {sizes}, root={root}")
    ours = [sizes[rank] if w == root else 0 for w in range(ranks)]
    return (sizes if rank == root else [0] * ranks), ours


def _check_rows(x: Tensor, rows: int, what: str) -> None:
    if x.ndim == 0 or x.shape[0] != rows:
        raise ValueError(f"{what}: x must be [{rows}, ...] on this rank, as sizes says; got {tuple(x.shape)}")


def all_reduce(x: Tensor, group: ProcessGroup | None, averaged: bool = True) -> Tensor:
    """Sum over the ranks of a group, for objectives that every rank computes alike from the sum.

    Afterwards gradients are either `averaged` over the W ranks, which have parts of the batch, or summed, where
    ranks have parts of one sequence. So the gradient that reaches this rank's part is W times the one that arrives
    here, or that one. Each rank can do that alone: no collective in the backward.
    """
    total = x.detach().clone()
    with named("sums of a balance loss", group):
        dist.all_reduce(total, group=group)
    factor = dist.get_world_size(group) if averaged else 1
    return total + factor * (x - x.detach())  # 0, with that gradient
