"""What collectives take: each axis of a layout over the links inside nodes and between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil, log2

from ...dispatch.autoselect.profile import Message
from .cluster import Cluster


@dataclass(frozen=True)
class Group:
    """Ranks that take part in a collective: `size` of them, `stride` ranks apart, as `Meshes.of` numbers them.

    >>> cluster = Cluster.load("selene")
    >>> Group(cluster, size=4, stride=8).nodes  # one rank on each of four nodes
    4
    """

    cluster: Cluster
    size: int
    stride: int = 1
    slowdown: float = 1.0  # the slowest link of the group has so many times less than its bandwidth between nodes

    @cached_property
    def nodes(self) -> int:
        """That the group is spread over."""
        return ceil(self.size / self.local)

    @cached_property
    def local(self) -> int:
        """Ranks on one node."""
        return min(self.size, max(1, self.cluster.ranks_per_node // self.stride))

    @cached_property
    def _byte(self) -> float:
        """Seconds of a byte that goes round a ring: inside each node once, and over every node's own links."""
        inside = 1e-9 / self.cluster.inside.gbs if self.local > 1 else 0.0
        # the rings of a group use the adapters of all its ranks on a node
        between = self.slowdown * 1e-9 / self.cluster.between.gbs / self.local if self.nodes > 1 else 0.0
        return max(inside, between)

    @cached_property
    def _step(self) -> float:
        """Seconds of a collective without bytes: its start, and messages along a tree."""
        if self.size == 1:
            return 0.0
        inside, between = self.cluster.inside, self.cluster.between
        hops = 1e-6 * (inside.message_us * log2(self.local) + between.message_us * log2(max(self.nodes, 1)))
        return 1e-6 * (between if self.nodes > 1 else inside).step_us + 2 * hops

    def all_gather(self, size: float) -> float:
        """Seconds until every rank has `size` bytes in all, of which it had its part; a reduce-scatter as well."""
        return self._step + size * (self.size - 1) / self.size * self._byte if self.size > 1 else 0.0

    def all_reduce(self, size: float) -> float:
        """Seconds of a sum of `size` bytes: 2 (n - 1) / n of them go round the ring."""
        return self._step + 2 * size * (self.size - 1) / self.size * self._byte if self.size > 1 else 0.0

    def send(self, size: float) -> float:
        """Seconds for `size` bytes from each rank to the next one, `stride` ranks away, all at the same time."""
        if self.size == 1:
            return 0.0
        away = self.stride * self.size > self.cluster.ranks_per_node
        wire = self.cluster.between if away else self.cluster.inside
        return 1e-6 * wire.step_us + size * (self.slowdown if away else 1.0) * 1e-9 / wire.gbs

    def all_to_all(self, message: Message) -> dict[str, float]:
        """Seconds of a trip to the experts and home, and of its backward, with each transport of the runtime."""
        if self.size == 1:
            return {"local": 0.0}
        times = self.cluster.profile(self.nodes, self.local, self.slowdown).predict(message, 1)
        if min(self.nodes, self.local) == 1:
            return {"flat": times["flat"]}
        fabric = self.cluster.fabric
        if fabric.rails and fabric.oversubscription > self.slowdown:  # flat sends from any rail to any other
            above = self.cluster.profile(self.nodes, self.local, fabric.oversubscription)
            times["flat"] = above.predict(message, 1)["flat"]
        return times
