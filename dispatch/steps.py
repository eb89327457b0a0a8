"""Dispatch and combine as generators, so that several of them can be interleaved.

A generator yields what it needs and is sent the answer: sizes from other ranks, numbers on the host, or rows. `finish`
runs one generator by itself. `prepare` and `interleave` run the generators of several chunks together: all chunks
share the exchanges of sizes, and rows of one chunk travel while the experts compute another. `interleaved` is the same
inside a generator, for rows that make two exchanges: one piece makes the second while the next piece makes the first.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .agreement import DispatchError
from .collectives import Travel, all_to_all_start, exchange_sizes
from .place import LayerCall
from .traced import Arrived
from .wire import Wire

Result = TypeVar("Result")


class Sizes(NamedTuple):
    """Request for `exchange_sizes` of int64 [W, ...]. The answer has the same shape."""

    sizes: Tensor
    group: ProcessGroup

    @staticmethod
    def answer(asked: Sequence[Sizes], call: LayerCall | None) -> list[Tensor]:
        """Answer the requests of several chunks with one exchange."""
        flat = [a.sizes.flatten(1) for a in asked]
        came = exchange_sizes(torch.cat(flat, 1), asked[0].group, call).split([f.shape[1] for f in flat], 1)
        return [c.reshape(a.sizes.shape) for c, a in zip(came, asked, strict=True)]


class Read(NamedTuple):
    """Request for int64 [n] as a list of Python numbers: a host sync."""

    numbers: Tensor

    @staticmethod
    def answer(asked: Sequence[Read], call: LayerCall | None) -> list[list[int]]:
        """Answer the requests of several chunks with one host sync."""
        host = iter(torch.cat([a.numbers for a in asked]).tolist())
        return [list(islice(host, len(a.numbers))) for a in asked]


class Rows(NamedTuple):
    """Request for `all_to_all` of these tensors. The answer is the received tensors.

    With ``at_once=True`` the answer is the exchange under way, without a wait. Yield that to wait for its tensors. So
    one generator can have several exchanges under way.
    """

    tensors: tuple[Tensor, ...]
    send: list[int] | None
    recv: list[int] | None
    group: ProcessGroup
    wire: Wire | None = None  # format in which the first tensor is sent
    at_once: bool = False

    def start(self, call: LayerCall | None) -> Travel | Arrived:
        """Start the exchange."""
        send, recv, group, wire = self.send, self.recv, self.group, self.wire
        return all_to_all_start(*self.tensors, send=send, recv=recv, group=group, wire=wire, call=call)


class Ready(NamedTuple):
    """No request: it says that a chunk is prepared, and that only `Rows` follow.

    In a dispatch, `counts` int64 [L] and `rows` tell the size of its `Batch`. `most` is the largest number of rows that
    this rank sends, passes on or receives in any of its exchanges.
    """

    counts: Tensor | None = None
    rows: int = 0
    most: int = 0


Ask: TypeAlias = Sizes | Read | Rows | Ready | Travel | Arrived
Steps: TypeAlias = Generator[Ask, Any, Result]


class Beside:
    """A computation that needs nothing from other ranks. It runs once, as soon as rows travel or its result is asked.

    Args:
        compute: function of no arguments.
    """

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._result: Tensor | None = None

    def __call__(self) -> Tensor:
        """Compute it now, unless that is done."""
        if self._result is None:
            self._result = self._compute()
        return self._result


def finish(steps: Steps[Result], call: LayerCall | None = None, beside: Beside | None = None) -> Result:
    """Run one generator by itself: answer every request at once.

    Args:
        steps: the generator.
        call: the forward it belongs to; None, the default, if there is no `Place`.
        beside: computed while the first rows travel, and in the backward while their gradients do; None, the default.

    Returns:
        What the generator returns.
    """
    answer = None
    while True:
        try:
            ask = steps.send(answer)
        except StopIteration as end:
            return returned(end)
        if isinstance(ask, Ready):
            answer = None
        elif isinstance(ask, Rows | Travel | Arrived):
            travel = ask.start(call) if isinstance(ask, Rows) else ask
            if isinstance(ask, Rows) and ask.at_once:
                answer = travel
                continue
            if beside is not None:
                beside()
            answer = travel.wait()
        else:
            (answer,) = ask.answer([ask], call)  # pyright: ignore[reportArgumentType]


def returned(end: StopIteration) -> Any:
    """Return value of a generator: `end.value`, in a form that `torch.compile` supports."""
    return end.args[0] if end.args else None


def prepare(chunks: Sequence[Steps], call: LayerCall | None = None) -> list[Ready]:
    """Run the generators of all chunks until they are ready. They share every exchange of sizes and every host sync."""
    asked = [next(chunk) for chunk in chunks]
    while isinstance(asked[0], Sizes | Read):
        answers = asked[0].answer(asked, call)  # pyright: ignore[reportArgumentType]
        asked = [chunk.send(answer) for chunk, answer in zip(chunks, answers, strict=True)]
    ready = [ask for ask in asked if isinstance(ask, Ready)]
    assert len(ready) == len(asked), "a chunk sent rows before it was ready"
    return ready


def until_ready(steps: Steps) -> Steps[Ready]:
    """Steps of a generator until it is ready. Continue afterwards with ``yield from steps``."""
    answer = None
    while not isinstance(ask := steps.send(answer), Ready):
        answer = yield ask
    return ask


def interleave(
    chunks: Sequence[Steps[Result]], call: LayerCall | None = None, beside: Beside | None = None
) -> list[Result]:
    """Run the generators of several prepared chunks as `interleaved` does. `beside` is computed before the first wait.

    Returns:
        What the generators return, in the order of chunks.
    """
    return finish(interleaved(chunks), call, beside)


def interleaved(chunks: Sequence[Steps[Result]]) -> Steps[list[Result]]:
    """Run the generators of several chunks inside another one, so that rows of one travel while another computes.

    In each round one more chunk starts. Every other chunk makes one step: it waits for its rows, computes, and sends
    the next rows. The newest chunk goes first, so that its rows travel while older chunks compute. For three chunks
    with one exchange to the experts (o), the experts (E) and one exchange back (h)::

        round 0   chunk 0: start o
        round 1   chunk 1: start o                chunk 0: wait o, E, start h
        round 2   chunk 2: start o                chunk 1: wait o, E, start h    chunk 0: wait h
        round 3   chunk 2: wait o, E, start h     chunk 1: wait h
        round 4   chunk 2: wait h

    Autograd runs the backward in reverse, with starts in place of waits, so the backward is interleaved as well.

    Returns:
        What the generators return, in the order of chunks.
    """
    done: dict[int, Result] = {}
    under_way: list[tuple[int, Any]] = []  # oldest first
    numbers = iter(range(len(chunks)))
    while len(done) < len(chunks):
        under_way += [(number, None) for number in islice(numbers, 1)]
        still = []
        for number, travel in reversed(under_way):
            answer = None if travel is None else (yield travel)
            try:
                ask = chunks[number].send(answer)
                while isinstance(ask, Rows) and ask.at_once:
                    ask = chunks[number].send((yield ask))
            except StopIteration as end:
                done[number] = returned(end)
                continue
            still.append((number, (yield ask._replace(at_once=True)) if isinstance(ask, Rows) else ask))
        under_way = still[::-1]
    return [done[number] for number in range(len(chunks))]


def announce_all(chunks: Sequence[Steps], call: LayerCall | None = None) -> list[Ready]:
    """Agree with the other ranks and exchange sizes, and stop before rows leave. Returns what each chunk would hold."""
    ready = prepare(chunks, call)
    for chunk in chunks:
        chunk.close()
    return ready


def refuse_all(refusals: Sequence[Steps[None]], call: LayerCall | None = None) -> None:
    """Send refusals where the other ranks expect sizes, one for each of their chunks.

    The first chunk also runs to its end, for dispatchers without steps of their own. Their first dispatch fails on
    every rank, so one refusal is enough.
    """
    with suppress(DispatchError):
        prepare(refusals, call)
        finish(refusals[0], call)
