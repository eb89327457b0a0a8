"""Time of collectives along an axis, over links inside nodes and between them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from math import ceil, lcm, log2

from ...dispatch.autoselect.profile import Message
from .cluster import Cluster


@cache
def _on_nodes(size: int, stride: int, per_node: int, ranks: int) -> tuple[int, int]:
    """Fewest and most ranks that a group has on one node, over all groups of a job with `ranks` ranks.

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
    """The `size` ranks of a collective, which are `stride` ranks apart in the numbers of `Meshes.of`.

    >>> cluster = Cluster.load("selene")
    >>> Group(cluster, size=4, stride=8).nodes  # one rank on each of four nodes
    4
    """

    cluster: Cluster
    size: int
    stride: int = 1
    slowdown: float = 1.0  # nominal bandwidth between nodes over the bandwidth of the slowest link
    ranks: int = 0  # number of all ranks of the job; 0 assumes that such groups fill whole nodes

    @cached_property
    def nodes(self) -> int:
        """Number of nodes that the group is spread over."""
        return ceil(self.size / self.local)

    @cached_property
    def local(self) -> int:
        """Number of ranks on one node. Where sizes do not divide, groups differ, and the fewest count."""
        return self._on_nodes[0]

    @cached_property
    def _on_nodes(self) -> tuple[int, int]:
        return _on_nodes(self.size, self.stride, self.cluster.ranks_per_node, self.ranks)

    @cached_property
    def _byte(self) -> float:
        """Seconds of a byte that goes round a ring, inside each node and between all nodes."""
        inside = 1e-9 / self.cluster.inside.gbs if self.local > 1 else 0.0
        # the rings of a group use the adapters of all its ranks on a node
        between = self.slowdown * 1e-9 / self.cluster.between.gbs / self.local if self.nodes > 1 else 0.0
        return max(inside, between)

    @cached_property
    def _step(self) -> float:
        """Seconds of a collective without bytes: its start, and the messages along a tree."""
        if self.size == 1:
            return 0.0
        inside, between = self.cluster.inside, self.cluster.between
        hops = 1e-6 * (inside.message_us * log2(self.local) + between.message_us * log2(max(self.nodes, 1)))
        return 1e-6 * (between if self.nodes > 1 else inside).step_us + 2 * hops

    def all_gather(self, size: float) -> float:
        """Seconds of an all-gather after which every rank has `size` bytes. A reduce-scatter takes as long."""
        return self._step + size * (self.size - 1) / self.size * self._byte if self.size > 1 else 0.0

    def all_reduce(self, size: float) -> float:
        """Seconds of an all-reduce of `size` bytes, of which 2 (n - 1) / n go round the ring."""
        return self._step + 2 * size * (self.size - 1) / self.size * self._byte if self.size > 1 else 0.0

    def reduce_scatter(self, size: float) -> float:
        """Seconds of a reduce-scatter of `size` bytes. gloo makes an all-reduce of it."""
        return self.all_reduce(size) if self.cluster.software.whole_reduce_scatter else self.all_gather(size)

    def wrapped(self, size: float, calls: int) -> float:
        """Additional seconds of `calls` collectives, of `size` bytes in all, if DTensor or FSDP2 makes them.

        Each call costs Python time and a start of its own, and its bytes are copied once.
        """
        device, wrapper = self.cluster.device, self.cluster.software.wrapper_us
        if self.size == 1 or not wrapper:
            return 0.0
        copied = 2 * size / (1e9 * device.memory_gbs * device.memory_share)
        return 1e-6 * calls * wrapper + (calls - 1) * self._step + copied

    def exchange(self, size: float) -> float:
        """Seconds to sum `size` bytes over tensor-parallel ranks.

        Megatron-LM makes an all-reduce, or with sequence parallelism a reduce-scatter and an all-gather of as many
        bytes. This library makes the latter two by DTensor.
        """
        if not self.cluster.software.wrapper_us:
            return self.all_reduce(size)
        return self.reduce_scatter(size) + self.all_gather(size) + self.wrapped(2 * size, 2)

    def sent(self, size: float, calls: int) -> float:
        """Seconds of `calls` exchanges in which each rank sends `size` bytes in all."""
        return calls * self._step + size * self._byte if self.size > 1 else 0.0

    def send(self, size: float) -> float:
        """Seconds in which each rank sends `size` bytes to the next rank of the group, all at the same time."""
        if self.size == 1:
            return 0.0
        away = self.local < self.size
        wire = self.cluster.between if away else self.cluster.inside
        return 1e-6 * wire.step_us + size * (self.slowdown if away else 1.0) * 1e-9 / wire.gbs

    def all_to_all(self, message: Message) -> dict[str, float]:
        """Seconds of dispatch and combine, forward and backward, by the name of the transport."""
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
