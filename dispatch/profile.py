"""What the links of a cluster cost, and what a trip over them will take: messages * alpha + bytes * beta."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from math import comb, inf
from pathlib import Path

EXCHANGES = 7  # all-to-alls of a trip and its backward: sizes; rows and weights out, rows home; then both ways again
ROWS = 4  # of these carry rows


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
class Message:
    """What a layer sends, as the model needs to know it."""

    tokens: int  # T, of the rank that has most
    row_bytes: int  # D times the bytes of a number
    top_k: int
    num_experts: int


@dataclass(frozen=True)
class Profile:
    """Measured costs of a cluster (`turnout.dispatch.probe`), and predictions from them.

    >>> slow = Profile(nodes=4, locals=2, inside=Link(0, 1e-5, 1e-10), between=Link(0, 1e-5, 1e-7))
    >>> slow.choose(Message(tokens=4096, row_bytes=4096, top_k=8, num_experts=64))
    'node'
    """

    nodes: int
    locals: int  # ranks in each node
    inside: Link
    between: Link

    def predict(self, message: Message) -> dict[str, float]:
        """Seconds of a trip and its backward with each transport, for tokens that pick experts evenly.

        All send (L - 1) / L of what goes inside a node to another rank there, (N - 1) / N of what goes between
        nodes to another node. Flat sends a row for every pick to its rank; 2DH takes all rows through both steps;
        with "node", a token crosses once for each distinct node among its picks.
        """
        n, m, k, experts = self.nodes, self.locals, message.top_k, message.num_experts
        away, beside = (n - 1) / n, (m - 1) / m
        size = message.tokens * message.row_bytes * ROWS
        visited = n * (1 - comb(experts - experts // n, k) / comb(experts, k))  # distinct nodes among k picks
        e = EXCHANGES
        return {
            "flat": self.between.time(e, e * (n - 1) * m, size * k * away)
            + self.inside.time(0, e * (m - 1), size * k * beside / n),
            "2dh": self.between.time(e, e * (n - 1), size * k * away)
            + self.inside.time(e, e * (m - 1), size * k * beside),
            # one more: the experts' numbers travel beside the rows
            "node": self.between.time(e + 1, (e + 1) * (n - 1), size * visited * away)
            + self.inside.time(e, e * (m - 1), size * k * beside),
        }

    def choose(self, message: Message) -> str:
        """The transport with the shortest predicted trip; flat, the simplest, where it is as good."""
        if min(self.nodes, self.locals) == 1:
            return "flat"
        times = self.predict(message)
        return min(times, key=lambda name: times[name])

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read what `save` has written; ValueError if it is anything else."""
        try:
            given = json.loads(Path(path).read_text())
            inside, between = (_link(given.pop(name), name) for name in ("inside", "between"))
            profile = cls(**given, inside=inside, between=between)
            if not all(isinstance(n, int) and n > 0 for n in (profile.nodes, profile.locals)):
                raise ValueError("nodes and locals must be positive integers")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a profile ({error}); make one with python -m turnout.dispatch.probe"
            ) from None
        return profile


def _link(given: dict[str, float], name: str) -> Link:
    link = Link(**given)
    for field in fields(link):
        value = getattr(link, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < inf:
            raise ValueError(f"{name}.{field.name} must be seconds, a number of at least 0; got {value!r}")
    return link
