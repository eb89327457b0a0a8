"""What collectives take: each axis of a layout over the links inside nodes and between them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from math import ceil, lcm, log2

from ...dispatch.autoselect.profile import Message
from .cluster import Cluster


@cache
def _on_nodes(size: int, stride: int, per_node: int, ranks: int) -> tuple[int, int]:
    """Fewest and most ranks of a group that are on one node, over all groups of `ranks` ranks.

    >>> _on_nodes(6, 1, 8, 24), _on_nodes(6, 1, 8, 6)  # ranks 6 to 11 are on two nodes; a job of 6 ranks has but one
    ((2, 6), (6, 6))
    """
    span = size * stride
    counts = set()
    for first in range(0, min(ranks, lcm(span, per_node)) or lcm(span, per_node), span):
        for rank in range(first, first + stride):
            counts.update(Counter(each // per_node for each in range(rank, rank + span, stride)).values())
    return min(counts), max(counts)


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
    ranks: int = 0  # of the job; 0: so many that such groups fill whole nodes

    @cached_property
    def nodes(self) -> int:
        """That the group is spread over."""
        return ceil(self.size / self.local)

    @cached_property
    def local(self) -> int:
        """Ranks on one node, the fewest of any such group: some lie across nodes where sizes do not divide."""
        return self._on_nodes[0]

    @cached_property
    def _on_nodes(self) -> tuple[int, int]:
        return _on_nodes(self.size, self.stride, self.cluster.ranks_per_node, self.ranks)

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

    def reduce_scatter(self, size: float) -> float:
        """Seconds of a sum of `size` bytes of which every rank keeps its part; gloo's is an all-reduce."""
        return self.all_reduce(size) if self.cluster.software.whole_reduce_scatter else self.all_gather(size)

    def wrapped(self, size: float, calls: int) -> float:
        """Seconds that `calls` collectives, of `size` bytes in all, take longer in the hands of DTensor or FSDP2.

        Each is put together in Python and starts by itself, and what it sends or gets is copied once.
        """
        device, wrapper = self.cluster.device, self.cluster.software.wrapper_us
        if self.size == 1 or not wrapper:
            return 0.0
        copied = 2 * size / (1e9 * device.memory_gbs * device.memory_share)
        return 1e-6 * calls * wrapper + (calls - 1) * self._step + copied

    def exchange(self, size: float) -> float:
        """Seconds of a sum of `size` bytes on its way through tensor parallelism.

        Megatron-LM's is an all-reduce, or with sequence parallelism a reduce-scatter and an all-gather of as many
        bytes; this library's are the latter, by DTensor.
        """
        if not self.cluster.software.wrapper_us:
            return self.all_reduce(size)
        return self.reduce_scatter(size) + self.all_gather(size) + self.wrapped(2 * size, 2)

    def sent(self, size: float, calls: int) -> float:
        """Seconds of `calls` exchanges in which each rank sends `size` bytes in all to others."""
        return calls * self._step + size * self._byte if self.size > 1 else 0.0

    def send(self, size: float) -> float:
        """Seconds for `size` bytes from each rank to the next one, `stride` ranks away, all at the same time."""
        if self.size == 1:
            return 0.0
        away = self.local < self.size
        wire = self.cluster.between if away else self.cluster.inside
        return 1e-6 * wire.step_us + size * (self.slowdown if away else 1.0) * 1e-9 / wire.gbs

    def all_to_all(self, message: Message) -> dict[str, float]:
        """Seconds of a trip to the experts and home, and of its backward, with each transport of the runtime."""
        if self.size == 1:
            return {"local": 0.0}
        times = self.cluster.profile(self.nodes, self.local, self.slowdown).predict(message, 1)
        fewest, most = self._on_nodes
        if self.nodes == 1 or most == 1 or fewest != most:  # the others need as many ranks on each node
            return {"flat": times["flat"]}
        fabric = self.cluster.fabric
        if fabric.rails and fabric.oversubscription > self.slowdown:  # flat sends from any rail to any other
            above = self.cluster.profile(self.nodes, self.local, fabric.oversubscription)
            times["flat"] = above.predict(message, 1)["flat"]
        return times
