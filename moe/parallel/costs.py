"""Cost model of one layer: predicts the time of a step for each way to bring tokens and experts together.

The formulas are in docs/explanations/adaptive.md. Links and transports are in `dispatch/autoselect/profile.py`; this
file adds what travels for `parallelism` and `shadow`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...dispatch.autoselect.profile import EXCHANGES, ROWS, TRANSPORTS, Link, Message, Profile, Work

Kind = tuple[int, bool, str, bool]


class LayerChoice(NamedTuple):
    """How a layer brings tokens and experts together.

    Attributes:
        parallelism: r, as in `MoE.parallelism`.
        shadow: number of experts in `MoE.shadow`, the hottest ones.
        transport, chunks: as in `AutoDispatcher`.
    """

    parallelism: int
    shadow: int
    transport: str
    chunks: int

    @property
    def kind(self) -> Kind:
        """What choices of one kind have in common. They differ only in numbers of shadowed experts and chunks."""
        return self.parallelism, self.shadow > 0, self.transport, self.chunks > 1

    def __str__(self) -> str:
        if self.parallelism == 0:
            return "parallelism 0"
        shadowed = f", {self.shadow} shadowed" if self.shadow else ""
        return f"parallelism {self.parallelism}{shadowed}, {self.transport} in {self.chunks}"


class LayerLoad(NamedTuple):
    """Load of a layer in one forward, the same on all ranks.

    Attributes:
        tokens: mean number of tokens of a rank.
        shares: share of all T k choices that each expert computes; less than 1 in sum if capacity drops some.
        owners: rank on axis "ep" that owns each expert.
    """

    tokens: float
    shares: tuple[float, ...]
    owners: tuple[int, ...]

    @property
    def ranks(self) -> tuple[float, ...]:
        """Share that the experts of each rank compute."""
        return self.ranks_without(())

    def ranks_without(self, away: Iterable[int]) -> tuple[float, ...]:
        """The same without the experts in `away`."""
        sums, gone = [0.0] * (max(self.owners) + 1), set(away)
        for expert, (owner, share) in enumerate(zip(self.owners, self.shares, strict=True)):
            sums[owner] += 0.0 if expert in gone else share
        return tuple(sums)

    def hottest(self, number: int) -> tuple[int, ...]:
        """Ids of the experts with the largest shares. Of equal shares, the smaller id comes first."""
        order = sorted(range(len(self.shares)), key=lambda expert: (-self.shares[expert], expert))
        return tuple(order[:number])

    @property
    def even(self) -> LayerLoad:
        """The same number of tokens, spread evenly over the experts."""
        return self._replace(shares=(sum(self.shares) / len(self.shares),) * len(self.shares))


@dataclass(frozen=True)
class LayerCosts:
    """Sizes of a layer, and measured costs of what it does.

    Attributes:
        links: costs of axis "ep".
        slices: cost of axis "etp".
        ways: ranks s along axis "etp".
        copy: seconds of one byte that is copied.
        work: seconds of an expert's row in the forward; the backward takes twice as long.
        each: seconds of an expert in forward and backward, however few its rows are.
        top_k, num_experts: of the layer.
        row_bytes: bytes of a row as it is sent.
        expert_bytes: bytes of one expert's parameters.
        learned_bytes: bytes of its gradients, less if some parameters are frozen.

    >>> fast, slow = Link(0, 1e-5, 1e-11), Link(0, 1e-4, 1e-7)
    >>> links = Profile(nodes=4, locals=1, inside=fast, between=slow)
    >>> costs = LayerCosts(links, fast, 1, 1e-10, Work(1e-7, 1e-7), 1e-6, 2, 8, 4096, 2**20, 2**20)
    >>> for tokens in (256, 65536):
    ...     times = costs.predict(LayerLoad(tokens, (1 / 8,) * 8, (0, 0, 1, 1, 2, 2, 3, 3)), [0, 1], [0], ["flat"], [1])
    ...     print(min(times, key=times.get))
    parallelism 1, flat in 1
    parallelism 0
    """

    links: Profile
    slices: Link
    ways: int
    copy: float
    work: Work
    each: float
    top_k: int
    num_experts: int
    row_bytes: int
    expert_bytes: int
    learned_bytes: int

    def predict(
        self,
        load: LayerLoad,
        parallelisms: Sequence[int],
        shadows: Sequence[int],
        transports: Sequence[str],
        chunks: Sequence[int],
    ) -> dict[LayerChoice, float]:
        """Seconds of forward and backward on the slowest rank, for each combination of the given values."""
        found = {}
        for r in parallelisms:
            for number in shadows if r else (0,):
                for degree in chunks if r else chunks[:1]:
                    times = self._seconds(load, r, load.hottest(number), degree)
                    names = transports if r else transports[:1]
                    found |= {LayerChoice(r, number, name, degree): times[name] for name in names}
        return found

    def _seconds(self, load: LayerLoad, r: int, shadow: Sequence[int], degree: int) -> dict[str, float]:
        """Seconds by transport."""
        T, k, ep = load.tokens, self.top_k, self.links.ranks
        stays = sum(load.shares) if r == 0 else sum(load.shares[e] for e in shadow)
        held = self.num_experts if r == 0 else self.num_experts / ep + len(shadow)
        here = self._copies(T * k) + 3 * self.work.time([T * k * stays]) + self.each * held
        here += self._weights(load, r, shadow)
        if r == 0:
            return dict.fromkeys(TRANSPORTS, here + self.links.alpha())  # ranks agree, and no rows travel
        ranks = load.ranks_without(shadow)
        arrives = ep * T * k * max(ranks)
        here += self._copies(arrives)
        if self.ways > 1:  # rows and partial sums inside the slices of an expert, out and home, forward and backward
            out = self.slices.time(EXCHANGES, EXCHANGES * (self.ways - 1), ROWS * (r - 1) * arrives * self.row_bytes)
            here += 2 * out + self._copies((r - 1) * arrives)
        message = Message(T, self.row_bytes, k, self.num_experts, shares=ranks, work=self.work)
        return {name: here + seconds for name, seconds in self.links.predict(message, degree).items()}

    def _copies(self, rows: float) -> float:
        """Seconds to put rows into order and back, forward and backward."""
        return 4 * rows * self.row_bytes * self.copy

    def _weights(self, load: LayerLoad, r: int, shadow: Sequence[int]) -> float:
        """Seconds to gather weights, and to send their gradients home."""
        ep, s = self.links.ranks, self.ways
        held = self.num_experts / ep  # on each rank of "ep", in s slices

        def across(experts: float) -> float:  # this many experts to each other rank of "ep", and their gradients back
            return sum(self.links.block_time(experts * size) for size in (self.expert_bytes, self.learned_bytes))

        def inside(experts: float) -> float:  # slices of this many experts from the other ranks of "etp"
            return sum(self.slices.time(1, s - 1, experts * size) for size in (self.expert_bytes, self.learned_bytes))

        seconds, copied = 0.0, 0.0
        if r == 0:
            copied = self.num_experts
            seconds += inside(held * (s - 1) / s) if s > 1 else 0.0
            seconds += across(held) if ep > 1 else 0.0
        elif r < s:
            copied = held / r
            seconds += inside(held / s * (s / r - 1))
        if r and shadow:
            owned = max(sum(load.owners[e] == rank for e in shadow) for rank in range(ep))
            copied += len(shadow)
            seconds += inside(owned * (s - 1) / s) if s > 1 else 0.0
            if owned * (ep - 1) > len(shadow):  # one rank has most of them: `copy_in_pieces`
                seconds += across(owned / ep) + across(len(shadow) / ep)
            elif ep > 1:
                seconds += across(owned)
        return seconds + 3 * copied * (self.expert_bytes + self.learned_bytes) * self.copy
