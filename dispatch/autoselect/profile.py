"""What links and products of a cluster cost, and what a trip will take: messages * alpha + bytes * beta, in chunks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from math import comb, inf
from pathlib import Path
from typing import NamedTuple, TypeVar

DEGREES = (1, 2, 4)  # numbers of chunks to choose from
EXCHANGES = 3  # all-to-alls of a chunk, forward, and again backward: rows and their weights out, rows home
ROWS = 2  # of these carry rows


@dataclass(frozen=True)
class Link:
    """The cost of one kind of link, in seconds, as one rank sees it while all ranks use it."""

    step: float  # an exchange, however small
    message: float  # each message of it: alpha
    byte: float  # each byte this rank sends: beta

    def time(self, steps: float, messages: float, bytes: float) -> float:
        """Seconds for exchanges of that many messages and bytes in all."""
        return steps * self.step + messages * self.message + bytes * self.byte


@dataclass(frozen=True)
class Flop:
    """The cost of a floating-point operation of matrix products, in seconds, while all ranks compute; 0: unknown."""

    float32: float = 0.0  # and wider
    bfloat16: float = 0.0  # and float16


Costs = TypeVar("Costs", Link, Flop)


@dataclass(frozen=True)
class Message:
    """What a layer sends and computes, as the model needs to know it."""

    tokens: int  # T, of the rank that has most
    row_bytes: int  # of a row on its way: D times the bytes of a number
    top_k: int
    num_experts: int
    row_flops: float = 0.0  # operations of an expert for a row, forward; 0: unknown
    narrow: bool = False  # it computes in 2-byte numbers


class Choice(NamedTuple):
    """A transport and the number of chunks it carries a batch in."""

    transport: str
    degree: int


@dataclass(frozen=True)
class Profile:
    """Measured costs of a cluster (`turnout.dispatch.autoselect.probe`), and predictions from them.

    >>> slow = Profile(nodes=4, locals=2, inside=Link(0, 1e-5, 1e-10), between=Link(0, 1e-5, 1e-7), flop=Flop(1e-10))
    >>> slow.choose(Message(tokens=4096, row_bytes=4096, top_k=8, num_experts=64))
    Choice(transport='node', degree=1)
    >>> slow.choose(Message(tokens=4096, row_bytes=4096, top_k=8, num_experts=64, row_flops=1e6))
    Choice(transport='node', degree=4)
    """

    nodes: int
    locals: int  # ranks in each node
    inside: Link
    between: Link
    flop: Flop = Flop()  # unknown in files that were written before it was measured

    def predict(self, message: Message, degree: int = 1) -> dict[str, float]:
        """Seconds of a trip and its backward with each transport, for tokens that pick experts evenly.

        All send (L - 1) / L of what goes inside a node to another rank there, (N - 1) / N of what goes between
        nodes to another node. Flat sends a row for every pick to its rank; 2DH takes all rows through both steps;
        with "node", a token crosses once for each distinct node among its picks.

        In n chunks, a chunk's exchanges take t = exchanges * alpha + bytes / n * beta, and the experts c for all
        chunks, twice as long backward. Forward and backward take, each::

            t + max(c, (n - 1) t)

        since nothing hides the first chunk's way out and the last one's way home; of the other exchanges and
        the experts, the longer of the two is what it takes. Sizes go ahead once, for all chunks.
        """
        n, m, k, experts = self.nodes, self.locals, message.top_k, message.num_experts
        away, beside = (n - 1) / n, (m - 1) / m
        size = message.tokens * message.row_bytes  # of an exchange of a row for each token
        visited = n * (1 - comb(experts - experts // n, k) / comb(experts, k))  # distinct nodes among k picks
        picked = self.inside.time(0, 0, size * k * beside)
        compute = message.tokens * k * message.row_flops * (self.flop.bfloat16 if message.narrow else self.flop.float32)

        by_node = self.between.time(1, n - 1, 0) + self.inside.time(1, m - 1, 0)
        flat = self.between.time(1, (n - 1) * m, 0) + self.inside.time(0, m - 1, 0)
        costs = {  # an exchange, what only the way out costs, the bytes of an exchange of rows
            "flat": (flat, 0.0, self.between.time(0, 0, size * k * away) + picked / n),
            "2dh": (by_node, 0.0, self.between.time(0, 0, size * k * away) + picked),
            # the experts' numbers travel beside the rows
            "node": (by_node, self.between.time(1, n - 1, 0), self.between.time(0, 0, size * visited * away) + picked),
        }

        def seconds(exchange: float, out: float, rows: float) -> float:
            backward = EXCHANGES * exchange + ROWS * rows / degree
            both = ((backward + out, compute), (backward, 2 * compute))
            return exchange + sum(t + max(c, (degree - 1) * t) for t, c in both)

        return {name: seconds(*cost) for name, cost in costs.items()}

    def choose(self, message: Message, degrees: tuple[int, ...] = DEGREES) -> Choice:
        """The shortest predicted trip; of equal ones that in fewer chunks, and flat, the simplest.

        Without a rate of products, in the profile or in the message, there is nothing to hide travel behind.
        """
        names = ("flat",) if min(self.nodes, self.locals) == 1 else ("flat", "2dh", "node")
        times = {degree: self.predict(message, degree) for degree in degrees}
        choices = [Choice(name, degree) for degree in degrees for name in names]
        return min(choices, key=lambda choice: times[choice.degree][choice.transport])

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read what `save` has written; ValueError if it is anything else."""
        try:
            given = json.loads(Path(path).read_text())
            inside, between = (_seconds(Link(**given.pop(name)), name) for name in ("inside", "between"))
            flop = _seconds(Flop(**given.pop("flop", {})), "flop")
            profile = cls(**given, inside=inside, between=between, flop=flop)
            if not all(isinstance(n, int) and n > 0 for n in (profile.nodes, profile.locals)):
                raise ValueError("nodes and locals must be positive integers")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a profile ({error}); make one with python -m turnout.dispatch.autoselect.probe"
            ) from None
        return profile


def _seconds(costs: Costs, name: str) -> Costs:
    for field in fields(costs):
        value = getattr(costs, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < inf:
            raise ValueError(f"{name}.{field.name} must be seconds, a number of at least 0; got {value!r}")
    return costs
