"""Which nodes a job takes and in what order, and how far apart neighbours along each axis then are."""

from __future__ import annotations

from typing import NamedTuple

from .cluster import Cluster
from .layout import Layout

ORDERS = ("by stage", "by replica")  # neighbours along dp, or along pp, are on neighbouring nodes


class Placement(NamedTuple):
    """Nodes in the order of their ranks.

    `Meshes.of` numbers ranks along tp, then dp, then pp. So in the order "by stage" a stage of a pipeline has nodes
    side by side. The other order is had by starting the same nodes in another order: torchrun's node ranks.
    """

    cluster: Cluster
    order: str = "by stage"

    def slowdown(self, axis: str, layout: Layout) -> float:
        """Factor by which links between nodes are slower for an axis, while all its groups use them.

        A pod's links upwards carry `pod / oversubscription` nodes at full speed. A ring, or a chain of stages, whose
        neighbours are `hop` nodes apart leaves a pod over `hop` nodes at a time; an all-to-all with all but what stays.
        """
        fabric, per_node = self.cluster.fabric, self.cluster.ranks_per_node
        nodes = -(-layout.ranks // per_node)
        slow = 1 / min(self._shares(nodes)) if nodes > 1 else 1.0
        if not fabric.pod or fabric.oversubscription == 1 or nodes <= fabric.pod:
            return slow
        stage = max(1, layout.stage // per_node)  # nodes of one stage
        by_stage = self.order == "by stage"
        if axis == "ep":
            spread = -(-layout.ep * layout.etp // per_node)
            leaves = max(0.0, 1 - fabric.pod / spread) * fabric.pod if by_stage else fabric.pod
            leaves = leaves if spread > 1 else 0
        else:
            hop = (1 if axis == "dp" else stage) if by_stage else (layout.pp if axis == "dp" else 1)
            leaves = min(hop, fabric.pod)
        return slow * max(1.0, leaves * fabric.oversubscription / fabric.pod)

    def nodes(self, layout: Layout) -> list[int]:
        """The nodes to start, in the order of their ranks: the healthy ones first, slow ones where they must be."""
        number = -(-layout.ranks // self.cluster.ranks_per_node)
        taken = sorted(self._healthy()[:number] if self.cluster.fabric.nodes else range(number))
        stage = layout.stage // self.cluster.ranks_per_node
        if self.order == "by stage" or stage < 2:
            return taken
        return [taken[replica * layout.pp + rank] for rank in range(layout.pp) for replica in range(stage)]

    def _healthy(self) -> list[int]:
        """Nodes that are up, those with most of their bandwidth first."""
        fabric = self.cluster.fabric
        shares = dict(fabric.slow)
        up = [node for node in range(fabric.nodes) if node not in fabric.down]
        return sorted(up, key=lambda node: (-shares.get(node, 1.0), node))

    def _shares(self, number: int) -> list[float]:
        """Share of its bandwidth that each node of the job still has."""
        fabric, shares = self.cluster.fabric, dict(self.cluster.fabric.slow)
        if not fabric.nodes:
            return [shares.get(node, 1.0) for node in range(number)]
        return [shares.get(node, 1.0) for node in self._healthy()[:number]] or [1.0]


def placements(cluster: Cluster) -> list[Placement]:
    """The placements that differ in time on a cluster."""
    different = cluster.fabric.pod and cluster.fabric.oversubscription > 1
    return [Placement(cluster, order) for order in (ORDERS if different else ORDERS[:1])]


def check_nodes(cluster: Cluster, gpus: int) -> None:
    """Raise ValueError if a cluster has fewer ranks."""
    fabric = cluster.fabric
    if not fabric.nodes:
        return
    up = fabric.nodes - len(set(fabric.down))
    if gpus > up * cluster.ranks_per_node:
        raise ValueError(
            f"--gpus {gpus}: {up} of {fabric.nodes} nodes are up, with {up * cluster.ranks_per_node} ranks; ask for "
            "at most as many"
        )
