"""Cost model of a cluster: predicts the time of each transport from measured costs of messages, bytes and products."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from math import comb, inf
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..node import PIECES
from .node_cost import in_pieces

TRANSPORTS = ("flat", "2dh", "node", "node in pieces")
DEGREES = (1, 2, 4)  # numbers of chunks to choose from
EXCHANGES = 3  # all-to-alls of a chunk in the forward, and again in the backward: rows, their weights, and outputs
ROWS = 2  # of these, exchanges of rows: tokens and outputs


@dataclass(frozen=True)
class Link:
    """Cost of one kind of link in seconds, as one rank sees it while all ranks use it.

    Attributes:
        step: seconds of an exchange of any size.
        message: seconds of each message in it (alpha).
        byte: seconds of each byte that the rank sends (beta).
    """

    step: float
    message: float
    byte: float

    def time(self, steps: float, messages: float, bytes: float) -> float:
        """Seconds of that many exchanges with that many messages and bytes in total."""
        return steps * self.step + messages * self.message + bytes * self.byte


@dataclass(frozen=True)
class Flop:
    """Seconds of one floating-point operation of matrix products while all ranks compute; 0, the default, is unknown.

    Attributes:
        float32: operations in float32 or wider.
        bfloat16: operations in bfloat16 or float16.
    """

    float32: float = 0.0
    bfloat16: float = 0.0


Costs = TypeVar("Costs", Link, Flop)


@dataclass(frozen=True)
class Message:
    """What one forward of a layer sends and computes.

    Attributes:
        tokens: T, on the rank with the most tokens.
        row_bytes: bytes of a row as it is sent: D times the bytes of a number.
        top_k: experts of each token.
        num_experts: number of experts E, on all ranks together.
        row_flops: operations of an expert for one row in the forward. 0, the default, is unknown.
        narrow: whether experts compute in 2-byte numbers; False by default.
    """

    tokens: int
    row_bytes: int
    top_k: int
    num_experts: int
    row_flops: float = 0.0
    narrow: bool = False


class Choice(NamedTuple):
    """A transport by name, and the number of chunks."""

    transport: str
    degree: int


@dataclass(frozen=True)
class Profile:
    """Measured costs of a cluster, which predict the time of each transport.

    Make one with ``python -m turnout.dispatch.autoselect.probe``, and give it to `parallelize`.

    Attributes:
        nodes: number of nodes.
        locals: number of ranks in each node.
        inside: cost of links inside a node.
        between: cost of links between nodes.
        flop: cost of matrix products; unknown by default, as in files of older versions.

    >>> slow = Profile(nodes=4, locals=2, inside=Link(0, 1e-5, 1e-10), between=Link(0, 1e-5, 1e-7), flop=Flop(1e-10))
    >>> slow.choose(Message(tokens=4096, row_bytes=4096, top_k=8, num_experts=64))
    Choice(transport='node in pieces', degree=1)
    >>> slow.choose(Message(tokens=4096, row_bytes=4096, top_k=8, num_experts=64, row_flops=1e6))
    Choice(transport='node', degree=4)
    """

    nodes: int
    locals: int
    inside: Link
    between: Link
    flop: Flop = Flop()

    def predict(self, message: Message, degree: int = 1) -> dict[str, float]:
        """Predict the time of each transport, in seconds, for tokens that choose experts evenly.

        The time is for dispatch, experts and combine, forward and backward. There are M ranks in each of N nodes. Of
        the rows inside a node, (M - 1) / M go to another rank. Of the rows between nodes, (N - 1) / N go to another
        node. Flat sends each row straight to its rank. 2DH sends all rows through both exchanges. Node-deduplicated
        sends a token between nodes once for each distinct node among its experts.

        With n chunks, the exchanges of one chunk take t = exchanges * alpha + bytes / n * beta. The experts take c for
        all chunks together, and twice that in the backward. Forward and backward then take, each::

            t + max(c, (n - 1) t)

        Nothing hides the first dispatch and the last combine. The other exchanges run at the same time as the experts,
        so the longer of the two counts. Sizes are exchanged once, for all chunks. In one chunk, node-deduplicated
        dispatch is also predicted in pieces (`in_pieces`).

        Args:
            message: what the layer sends and computes.
            degree: number of chunks, 1 by default.

        Returns:
            Seconds by name of transport: those of `TRANSPORTS`.
        """
        n, m, k, experts = self.nodes, self.locals, message.top_k, message.num_experts
        away, beside = (n - 1) / n, (m - 1) / m
        size = message.tokens * message.row_bytes  # bytes of one row for each token
        distinct = n * (1 - comb(experts - experts // n, k) / comb(experts, k))  # mean number of nodes of a token
        picked = self.inside.time(0, 0, size * k * beside)
        compute = message.tokens * k * message.row_flops * (self.flop.bfloat16 if message.narrow else self.flop.float32)

        by_node = self.between.time(1, n - 1, 0) + self.inside.time(1, m - 1, 0)
        flat = self.between.time(1, (n - 1) * m, 0) + self.inside.time(0, m - 1, 0)
        distant = self.between.time(0, 0, size * distinct * away)
        pieces = PIECES if degree == 1 else 1  # chunks keep the links as busy
        several, rows_in_pieces = in_pieces(by_node, distant, picked, pieces)
        ids = self.between.time(1, n - 1, 0)  # expert ids have an exchange of their own
        costs = {  # time of an exchange without its bytes, extra time of dispatch, time of the bytes of all rows
            "flat": (flat, 0.0, self.between.time(0, 0, size * k * away) + picked / n),
            "2dh": (by_node, 0.0, self.between.time(0, 0, size * k * away) + picked),
            "node": (by_node, ids, distant + picked),
            "node in pieces": (several, pieces * ids, rows_in_pieces),
        }

        def seconds(exchange: float, out: float, rows: float) -> float:
            backward = EXCHANGES * exchange + ROWS * rows / degree
            both = ((backward + out, compute), (backward, 2 * compute))
            return exchange + sum(t + max(c, (degree - 1) * t) for t, c in both)

        return {name: seconds(*cost) for name, cost in costs.items()}

    def choose(self, message: Message, degrees: tuple[int, ...] = DEGREES) -> Choice:
        """Transport and number of chunks with the shortest predicted time. On a tie, fewer chunks win, then flat.

        Without a rate of matrix products, in the profile or in the message, the choice is one chunk.

        Args:
            message: what the layer sends and computes.
            degrees: numbers of chunks to choose from, in ascending order; (1, 2, 4) by default.

        Returns:
            Choice: the name of the transport, and the number of chunks.
        """
        names = TRANSPORTS[:1] if min(self.nodes, self.locals) == 1 else TRANSPORTS
        times = {degree: self.predict(message, degree) for degree in degrees}
        choices = [Choice(name, degree) for degree in degrees for name in names]
        return min(choices, key=lambda choice: times[choice.degree][choice.transport])

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile that `save` wrote.

        Raises:
            ValueError: the file holds anything else.
            OSError: the file cannot be read.
        """
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
