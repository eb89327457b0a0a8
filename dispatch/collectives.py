"""Differentiable all-to-all collectives on rows. No other file of the package exchanges tokens."""

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
from .place import LayerCall
from .traced import Arrived, exchange
from .wire import Wire, pack, unpack


def all_to_all(
    *tensors: Tensor,
    send: list[int] | None = None,
    recv: list[int] | None = None,
    group: ProcessGroup | None,
    wire: Wire | None = None,
) -> tuple[Tensor, ...]:
    """Exchange rows with every rank of a group; differentiable.

    Each tensor [sum(send), ...] is cut into W blocks, and block w goes to rank w. The received rows [sum(recv), ...]
    lie in the order of their source ranks. All tensors have the same splits and are sent at the same time. Blocks may
    be empty. With two ranks, ``send`` = [1, 2] on rank 0 and [1, 0] on rank 1::

        rank 0: a | b c   -> to 0: a, to 1: b c          rank 0 has  a d     recv = [1, 1]
        rank 1: d |       -> to 0: d, to 1: nothing      rank 1 has  b c     recv = [2, 0]

    Args:
        tensors: one or more tensors with the same number of rows. Trailing shapes and dtypes are the same on all ranks.
        send: rows to each rank, W numbers. None, the default, sends equal blocks.
        recv: rows from each rank, as `exchange_sizes` gives them. None, the default, goes with ``send=None``. Sizes
            that disagree between ranks are not detected here, but by `check_sizes`.
        group: the ranks; None is the default group. The backward runs on the same group.
        wire: format in which the first tensor [R, D] is sent, if it is floating: ``"bf16"`` or ``"fp8"`` (`wire.pack`).
            Its gradient is then sent in bfloat16. None, the default, sends it as it is.

    Returns:
        The received tensors, one for each of `tensors`.

    Raises:
        DispatchError: the exchange failed, such as by its timeout. The message names the ranks to suspect.

    Examples:
        On 2 ranks, each of which sends one row to rank 0 and two rows to rank 1::

            came, recv = all_to_all_two_phase(x, send=[1, 2], group=group)
            (back,) = all_to_all(*came, send=recv, recv=[1, 2], group=group)  # equals x
    """
    return all_to_all_start(*tensors, send=send, recv=recv, group=group, wire=wire).wait()


class Travel(NamedTuple):
    """An all-to-all under way, as `all_to_all_start` returns it."""

    state: _Exchange
    edge: Tensor

    def wait(self) -> tuple[Tensor, ...]:
        """Wait for the received tensors. Call it once, and on every rank that needs a gradient."""
        return _Wait.apply(self.state, self.edge)  # pyright: ignore[reportReturnType]


def all_to_all_start(
    *tensors: Tensor,
    send: list[int] | None = None,
    recv: list[int] | None = None,
    group: ProcessGroup | None,
    wire: Wire | None = None,
    call: LayerCall | None = None,
) -> Travel | Arrived:
    """Start an `all_to_all`, so that other work can run before its `wait`; differentiable.

    In the backward the two halves change roles: gradients start in the backward of `wait`, and are waited for in the
    backward of the start. So work between the two halves also has its backward between them::

        forward     start ..... compute ..... wait
        backward     wait ..... compute ..... start

    On a GPU nothing blocks the host. NCCL runs the exchange on a stream of its own, after the work queued before the
    start. `wait` makes the current stream wait for it.

    Args:
        tensors, send, recv, group, wire: as in `all_to_all`.
        call: the forward that the exchange belongs to; None, the default, if there is no `Place`. Errors name it. On a
            CPU it also keeps gradients of different forwards apart.

    Returns:
        The exchange; its `wait()` returns the received tensors.

    Examples:
        ::

            travel = all_to_all_start(x, send=send, recv=recv, group=group)
            y = mlp(z)  # while x travels
            (rows,) = travel.wait()
    """
    wire = wire if tensors[0].is_floating_point() else None
    if torch.compiler.is_compiling():
        return exchange(tensors, send, recv, group, wire)
    state = _Exchange(send, recv, group, wire, tensors[0].dtype, call)
    return Travel(state, _Start.apply(state, *tensors))  # pyright: ignore[reportArgumentType]


@dataclass
class _Exchange:
    """State that both halves of one exchange share. It must not hold `edge`: the autograd graph would hold itself."""

    send: list[int] | None
    recv: list[int] | None
    group: ProcessGroup | None
    wire: Wire | None  # format of the first tensor
    dtype: torch.dtype  # dtype of the first tensor
    call: LayerCall | None = None
    backward: bool = False
    arriving: list[tuple[Tensor, dist.Work | _TaggedMessages]] = field(default_factory=list)  # from start to wait
    back: _Exchange | None = None  # the exchange of the gradients, while it is under way

    def start(self, tensor: Tensor) -> tuple[Tensor, dist.Work | _TaggedMessages]:
        tensor = tensor.contiguous()
        out = tensor.new_empty(tensor.shape[0] if self.recv is None else sum(self.recv), *tensor.shape[1:])
        if self.backward and self.call is not None and tensor.device.type == "cpu":
            return out, _TaggedMessages(out, self.recv, tensor, self.send, self.group, self.call.tag)
        work = dist.all_to_all_single(out, tensor, self.recv, self.send, group=self.group, async_op=True)
        assert work is not None, "this rank is not in the group"
        return out, work

    def named(self) -> AbstractContextManager[None]:
        """Name the phase and the forward in an error of the exchange."""
        return named("gradients of rows" if self.backward else "rows", self.group, self.call)

    def reversed(self) -> _Exchange:
        """Exchange of the gradients: the same group, with send and recv swapped."""
        wire = self.wire and "bf16"
        return _Exchange(self.recv, self.send, self.group, wire, self.dtype, self.call, not self.backward)


class _TaggedMessages:
    """An all-to-all as point-to-point messages with a tag, so that only the same backward receives them.

    Ranks agree on a forward before its rows travel, but autograd decides when each backward runs. If one rank's loss
    leaves a layer out, that rank would send gradients of another layer. gloo pairs the exchanges of a group by their
    order. It accepts a short message without an error, and ends the process on a long one. Tagged messages wait for
    their own tag instead, until the group's timeout raises an error that says where each rank is.

    Only backwards pay for this. With small messages, 8 ranks on 2 cores take 1.5 times as long, 2 ranks about as long.
    """

    def __init__(self, out: Tensor, recv, x: Tensor, send, group: ProcessGroup | None, tag: int) -> None:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        outs, ins = (t.split([t.shape[0] // ranks] * ranks if n is None else n) for t, n in ((out, recv), (x, send)))
        outs[rank].copy_(ins[rank])
        self.group, self.works = group, []
        for step in range(1, ranks):  # each rank starts with a different peer
            source, target = (rank - step) % ranks, (rank + step) % ranks
            if outs[source].numel():
                self.works.append(dist.irecv(outs[source], group=group, group_src=source, tag=tag))
            if ins[target].numel():
                self.works.append(dist.isend(ins[target], group=group, group_dst=target, tag=tag))

    def wait(self) -> None:
        limit = timeout_of(self.group)  # point-to-point works ignore the group's timeout (torch 2.13)
        for work in self.works:
            work.wait(limit)


class _Start(torch.autograd.Function):
    """Starts an exchange. The result is an empty tensor, `edge`, which links `_Wait` to it in the autograd graph."""

    @staticmethod
    def forward(ctx, state, *tensors):
        ctx.state = state
        packed = tensors if state.wire is None else (pack(tensors[0], state.wire), *tensors[1:])
        with state.named():
            state.arriving = [state.start(t) for t in packed]
        return tensors[0].new_empty(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *_Wait.apply(ctx.state.back, grad)  # pyright: ignore[reportGeneralTypeIssues]


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, state, edge):
        ctx.state, arriving, state.arriving = state, state.arriving, []
        assert arriving, "wait() was called twice"
        with state.named():
            for _, work in arriving:
                work.wait()
        out = tuple(t for t, _ in arriving)
        if state.wire is not None:
            out = (unpack(out[0], state.wire, state.dtype), *out[1:])
        ctx.mark_non_differentiable(*(t for t in out if not t.is_floating_point()))
        return out

    @staticmethod
    def backward(ctx, *grads):
        # Send all gradients, zeros too: ranks may need different ones, but must all call the same collectives.
        ctx.state.back = ctx.state.reversed()
        return None, _Start.apply(ctx.state.back, *grads)


def exchange_sizes(sizes: Tensor, group: ProcessGroup | None, call: LayerCall | None = None) -> Tensor:
    """Exchange one block of sizes with every rank: int64 [W, ...] to each rank -> [W, ...] from each rank.

    It is the first phase of a two-phase all-to-all, and not differentiable::

        rank 0: [1, 2]   -> to 0: 1, to 1: 2             rank 0 has  [1, 1]
        rank 1: [1, 0]   -> to 0: 1, to 1: 0             rank 1 has  [2, 0]

    Messages are padded to a length that is the same for all layers of the model. So ranks that are in different layers
    can still read each other's notes.

    Args:
        sizes: int64 [W, ...], block w for rank w.
        group: the W ranks; None is the default group.
        call: the forward that the exchange belongs to, for errors. None, the default, if there is no `Place`.

    Returns:
        int64 [W, ...], block w from rank w.

    Raises:
        DispatchError: the exchange failed.
    """
    flat = sizes.reshape(len(sizes), -1)
    numbers = max(flat.shape[1], 64 + 2 * call.place.widest if call is not None and call.place.widest else 64)
    sent = flat.new_zeros(len(flat), 1 << (numbers - 1).bit_length())
    sent[:, : flat.shape[1]] = flat
    came = torch.empty_like(sent)
    with named("sizes", group, call):
        dist.all_to_all_single(came, sent, group=group)
    return came[:, : flat.shape[1]].reshape(sizes.shape)


def check_sizes(send: list[int], recv: list[int], group: ProcessGroup | None) -> None:
    """Check that every rank expects what the others send, for `all_to_all` with sizes that were not exchanged.

    gloo accepts a short message without an error, and a long one ends the process that receives it. The check costs one
    small exchange and a host sync.

    Args:
        send, recv, group: as in `all_to_all`.

    Raises:
        DispatchError: two ranks disagree. The text is the same on every rank.
    """
    ranks = dist.get_world_size(group)
    table = exchange_sizes(torch.tensor([[send, recv]]).expand(ranks, 2, ranks), group).tolist()
    for w, (sends, _) in enumerate(table):
        for v, (_, expects) in enumerate(table):
            if sends[v] != expects[w]:
                raise DispatchError(
                    f"rank {w} of the group sends {sends[v]} rows to rank {v}, which expects {expects[w]} in recv; "
                    "take recv from `exchange_sizes`"
                )


def all_to_all_two_phase(
    *tensors: Tensor, send: list[int], group: ProcessGroup | None
) -> tuple[tuple[Tensor, ...], list[int]]:
    """Exchange sizes first, then rows, so that each rank needs to know only what it sends. It has one host sync.

    Args:
        tensors: as in `all_to_all`; the sizes go by the first tensor's device.
        send: rows to each rank, W numbers.
        group: the ranks; None is the default group.

    Returns:
        The received tensors, and ``recv``, the rows from each rank, which is ``send`` on the way back::

            rank 0: a | b c   1. sizes    to 0: 1, to 1: 2      rank 0 has  [1, 1]
            rank 1: d |                   to 0: 1, to 1: 0      rank 1 has  [2, 0]
                              2. payload  to 0: a, to 1: b c    rank 0 has  a d
                                          to 0: d               rank 1 has  b c

    Raises:
        DispatchError: an exchange failed.
    """
    recv = exchange_sizes(torch.tensor(send, device=tensors[0].device), group).tolist()
    return all_to_all(*tensors, send=send, recv=recv, group=group), recv


def all_reduce(x: Tensor, group: ProcessGroup | None, averaged: bool = True) -> Tensor:
    """Sum over the ranks of a group, for a loss that every rank computes from the same sum.

    Its backward is no collective, because each rank can scale its own gradient. Later, gradients are either averaged
    over the W ranks or summed. The gradient of x here is W times the given one if they are averaged, and equal to it
    otherwise.

    Args:
        x: the summand of this rank, the same shape on all ranks.
        group: the ranks; None is the default group.
        averaged: whether gradients are averaged later, because ranks have parts of the batch. True is the default.
            False if ranks have parts of one sequence, and gradients are summed.

    Returns:
        The sum, in the shape of x.
    """
    total = x.detach().clone()
    with named("sums of a loss", group):
        dist.all_reduce(total, group=group)
    factor = dist.get_world_size(group) if averaged else 1
    return total + factor * (x - x.detach())  # adds 0, and gives x its gradient
