"""Cost model of a cluster: predicts the time of each transport from measured costs of messages, bytes and products."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from math import inf, prod
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


class Work(NamedTuple):
    """Measured seconds that an expert takes for one row in the forward. Ranks may share processors, so there are two.

    Attributes:
        alone: while the other ranks wait.
        together: while all ranks compute.
    """

    alone: float
    together: float

    def time(self, rows: Sequence[float]) -> float:
        """Seconds until the last rank is done, from the rows of each rank."""
        return max(self.alone * max(rows), self.together * sum(rows) / len(rows))


@dataclass(frozen=True)
class Message:
    """What one forward of a layer sends and computes.

    Attributes:
        tokens: T, on the rank with the most tokens, or on a mean one.
        row_bytes: bytes of a row as it is sent: D times the bytes of a number.
        top_k: experts of each token.
        num_experts: number of experts E, on all ranks together.
        row_flops: operations of an expert for one row in the forward. 0, the default, is unknown.
        narrow: whether experts compute in 2-byte numbers; False by default.
        shares: share of all assignments that each rank's experts get from all ranks, in the order of the ranks. They
            add up to less than 1 if some tokens stay where they are. None, the default: even shares.
        work: measured time of the experts' rows; None, the default, estimates it from `row_flops`.
    """

    tokens: float
    row_bytes: int
    top_k: int
    num_experts: int
    row_flops: float = 0.0
    narrow: bool = False
    shares: tuple[float, ...] | None = field(default=None, repr=False)
    work: Work | None = field(default=None, repr=False)


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
        """Predict the time of each transport, in seconds: dispatch, experts and combine, forward and backward.

        There are N nodes of M ranks. Rank w gets the share s_w of all T k rows that each rank sends out, 1 / (N M) if
        tokens choose evenly. A link takes the time of the rank that sends or receives most over it. Flat sends each row
        straight to its rank. 2DH collects rows inside the node, at the rank whose local number is that of their
        destination. Node-deduplicated sends a token to a node once, however many of its experts are there.

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
            Seconds by name of transport, for all of `TRANSPORTS`.
        """
        n, m, k = self.nodes, self.locals, message.top_k
        size = message.tokens * message.row_bytes  # bytes of one row for each token
        sent = self._sent(message)
        flat, by_node = self.alpha(by_node=False), self.alpha(by_node=True)
        ids = self.between.time(1, n - 1, 0)  # expert ids have an exchange of their own

        flop = message.row_flops * (self.flop.bfloat16 if message.narrow else self.flop.float32)
        work = Work(flop, flop) if message.work is None else message.work
        compute = work.time([n * m * message.tokens * k * share for share in self._shares(message)])

        def seconds(name: str) -> float:
            pieces = PIECES if name == "node in pieces" and degree == 1 else 1  # chunks keep the links as busy
            between, inside = (size * rows / degree for rows in sent[name])  # bytes of one exchange of a chunk
            times = self.between.time(0, 0, between), self.inside.time(0, 0, inside)
            alpha, bytes = in_pieces(flat if name == "flat" else by_node, *times, pieces)
            backward = EXCHANGES * alpha + ROWS * bytes
            out = pieces * ids if name.startswith("node") else 0.0
            both = ((backward + out, compute), (backward, 2 * compute))
            return alpha + sum(t + max(c, (degree - 1) * t) for t, c in both)

        return {name: seconds(name) for name in TRANSPORTS}

    @property
    def ranks(self) -> int:
        """Number of ranks, on all nodes together."""
        return self.nodes * self.locals

    def alpha(self, by_node: bool = False) -> float:
        """Seconds of an all-to-all over all ranks without its bytes, or of one between nodes and one inside them."""
        n, m = self.nodes, self.locals
        if by_node:
            return self.between.time(1, n - 1, 0) + self.inside.time(1, m - 1, 0)
        return self.between.time(1, (n - 1) * m, 0) + self.inside.time(0, m - 1, 0)

    def block_time(self, bytes: float) -> float:
        """Seconds of an all-to-all over all ranks in which each sends so many bytes to each other rank."""
        n, m = self.nodes, self.locals
        return self.alpha() + self.between.time(0, 0, (n - 1) * m * bytes) + self.inside.time(0, 0, (m - 1) * bytes)

    def _shares(self, message: Message) -> Sequence[float]:
        return message.shares or [1 / self.ranks] * self.ranks

    def _sent(self, message: Message) -> dict[str, tuple[float, float]]:
        """Rows for each token that the busiest rank sends or receives between nodes, and inside its node.

        For even shares, flat sends k (N - 1) / N rows to other nodes, and k (M - 1) / (N M) inside the node.
        """
        n, m, k, E = self.nodes, self.locals, message.top_k, message.num_experts
        shares = self._shares(message)
        nodes = [sum(shares[i * m : (i + 1) * m]) for i in range(n)]  # share of each node
        columns = [sum(shares[j::m]) for j in range(m)]  # of each local number
        # a token visits a node unless all its k experts, which differ, are on others
        visits = [1 - prod(max(E * (1 - share) - i, 0) / (E - i) for i in range(min(k, E))) for share in nodes]
        whole, most = sum(nodes), max(shares)
        inside_node = max(nodes[w // m] - share for w, share in enumerate(shares))
        collected = max(columns[w % m] - share for w, share in enumerate(shares))
        flat = k * max((n - 1) * m * most, whole - min(nodes)), k * max((m - 1) * most, inside_node)
        twice = k * m * max((n - 1) * most, collected), k * max((m - 1) * max(columns), whole - min(columns))
        node = max((n - 1) * max(visits), sum(visits) - min(visits)), k * n * max((m - 1) * most, inside_node)
        return {"flat": flat, "2dh": twice, "node": node, "node in pieces": node}

    def choose(self, message: Message, degrees: tuple[int, ...] = DEGREES) -> Choice:
        """Transport and number of chunks with the shortest predicted time. On a tie, fewer chunks win, then flat.

        Without a rate of matrix products, in the profile or in the message, the choice is one chunk.

        Args:
            message: what the layer sends and computes.
            degrees: numbers of chunks to choose from, in ascending order; (1, 2, 4) by default.

        Returns:
            Choice: the name of the transport, and the number of chunks.
        """
        names = ("flat",) if min(self.nodes, self.locals) == 1 else TRANSPORTS
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
    for each in fields(costs):
        value = getattr(costs, each.name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < inf:
            raise ValueError(f"{name}.{each.name} must be seconds, a number of at least 0; got {value!r}")
    return costs
