"""A trip in steps: what a dispatcher asks of other ranks or of the host, apart from when that is done.

A trip is a generator. It yields what it needs and is sent the answer: sizes from the other ranks, numbers
on the host, rows. `finish` answers at once, which is the plain trip. Others may hold many trips, ask for
all of them together (`prepare`) and let one compute while another is under way (`interleave`).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .agreement import DispatchError
from .collectives import Travel, all_to_all_start, exchange_sizes
from .place import Visit
from .traced import Arrived
from .wire import Wire

Result = TypeVar("Result")


class Sizes(NamedTuple):
    """Asks for `exchange_sizes` of int64 [W, ...]; answered by what came, of the same shape."""

    sizes: Tensor
    group: ProcessGroup

    @staticmethod
    def answer(asked: Sequence[Sizes], visit: Visit | None) -> list[Tensor]:
        """Of any number of trips in one exchange."""
        flat = [a.sizes.flatten(1) for a in asked]
        came = exchange_sizes(torch.cat(flat, 1), asked[0].group, visit).split([f.shape[1] for f in flat], 1)
        return [c.reshape(a.sizes.shape) for c, a in zip(came, asked, strict=True)]


class Read(NamedTuple):
    """Asks for int64 [n] as a list: the host waits for the device."""

    numbers: Tensor

    @staticmethod
    def answer(asked: Sequence[Read], visit: Visit | None) -> list[list[int]]:
        """Of any number of trips in one wait."""
        host = iter(torch.cat([a.numbers for a in asked]).tolist())
        return [list(islice(host, len(a.numbers))) for a in asked]


class Rows(NamedTuple):
    """Asks for `all_to_all` of these tensors; answered by those that came."""

    tensors: tuple[Tensor, ...]
    send: list[int] | None
    recv: list[int] | None
    group: ProcessGroup
    wire: Wire | None = None  # how the first tensor travels

    def start(self, visit: Visit | None) -> Travel | Arrived:
        """Send them on their way."""
        send, recv, group, wire = self.send, self.recv, self.group, self.wire
        return all_to_all_start(*self.tensors, send=send, recv=recv, group=group, wire=wire, visit=visit)


class Ready(NamedTuple):
    """Asks for nothing: the trip is ready to leave, and from here on there are `Rows` alone.

    Of a dispatch, `counts` int64 [L] and `rows` are those of its batch to be.
    """

    counts: Tensor | None = None
    rows: int = 0


Ask: TypeAlias = Sizes | Read | Rows | Ready
Steps: TypeAlias = Generator[Ask, Any, Result]


def finish(steps: Steps[Result], visit: Visit | None = None) -> Result:
    """One trip by itself: every question is answered as it comes. `visit`: the forward it belongs to."""
    answer = None
    while True:
        try:
            ask = steps.send(answer)
        except StopIteration as end:
            return returned(end)
        if isinstance(ask, Ready):
            answer = None
        elif isinstance(ask, Rows):
            answer = ask.start(visit).wait()
        else:
            (answer,) = ask.answer([ask], visit)  # pyright: ignore[reportArgumentType]


def returned(end: StopIteration) -> Any:
    """What a generator returned: `end.value`, by a name that `torch.compile` knows."""
    return end.args[0] if end.args else None


def prepare(trips: Sequence[Steps], visit: Visit | None = None) -> None:
    """Bring trips of one kind to where they are ready to leave, with one exchange and one wait for all."""
    asked = [next(trip) for trip in trips]
    while isinstance(asked[0], Sizes | Read):
        answers = asked[0].answer(asked, visit)  # pyright: ignore[reportArgumentType]
        asked = [trip.send(answer) for trip, answer in zip(trips, answers, strict=True)]
    assert all(isinstance(ask, Ready) for ask in asked), "a trip sent rows before it was ready"


def until_ready(trip: Steps) -> Steps[Ready]:
    """The steps of a trip up to where it is ready; ``yield from trip`` goes on from there."""
    answer = None
    while not isinstance(ask := trip.send(answer), Ready):
        answer = yield ask
    return ask


def interleave(trips: Sequence[Steps[Result]], visit: Visit | None = None) -> list[Result]:
    """Trips that are ready, one setting out after the other, each under way while the one before computes.

    In each round a trip sets out and all others take one step: wait for their rows, do what there is to do,
    send on. The youngest goes first, so that its rows travel while the older ones compute. Of three trips
    with one exchange out (o), experts (E) and one home (h), a line being a round::

        0: start o
        1: wait o, E, start h      after  1: start o
        0: wait h                  after  1: wait o, E, start h      after  2: start o

    The backward runs this in mirror image, with waits for starts: it is interleaved as well.
    """
    done: dict[int, Result] = {}
    under_way: list[tuple[int, Any]] = []  # from the oldest on
    places = iter(range(len(trips)))
    while len(done) < len(trips):
        under_way += [(place, None) for place in islice(places, 1)]
        still = []
        for place, travel in reversed(under_way):
            answer = None if travel is None else travel.wait()
            try:
                ask = trips[place].send(answer)
            except StopIteration as end:
                done[place] = returned(end)
                continue
            assert isinstance(ask, Rows)
            still.append((place, ask.start(visit)))
        under_way = still[::-1]
    return [done[place] for place in range(len(trips))]


def announce(trips: Sequence[Steps], visit: Visit | None = None) -> None:
    """What ranks do in place of trips whose rows stay where they are: agree with the others, and go no further."""
    prepare(trips, visit)
    for trip in trips:
        trip.close()


def refuse(refusals: Sequence[Steps[None]], visit: Visit | None = None) -> None:
    """What ranks do that cannot take part: where trips ask for sizes, the others learn of it there.

    Of dispatchers that are not in steps the first trip fails on every rank, so they are told once.
    """
    with suppress(DispatchError):
        prepare(refusals, visit)
        finish(refusals[0], visit)
