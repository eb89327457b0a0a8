"""The step of a planned layout, replayed action by action."""

from __future__ import annotations

from .architecture import Architecture
from .breakdown import Estimate
from .cluster import Cluster
from .estimate import Estimator
from .share import stage_blocks
from .simulator import Simulation, StageTimes, simulate


def replay(model: Architecture, cluster: Cluster, plan: Estimate) -> Simulation:
    """Simulate the pipeline of a plan, each stage with its own blocks, without the optimizer and dp.

    Raises:
        ValueError: the plan has no pipeline.
    """
    layout = plan.layout
    if layout.pp == 1:
        raise ValueError("a timeline needs a pipeline: --pp 2 or more")
    estimator = Estimator(model, cluster, layout.micro_batches * layout.micro_batch * layout.dp)
    times = []
    stages = stage_blocks(model, layout.pp * layout.virtual)
    for index, blocks in enumerate(stages):
        forward, backward = estimator.stage(layout, blocks, index == 0, index + 1 == len(stages))
        times.append(StageTimes(forward, backward))
    return simulate(layout, times, estimator.send(layout, estimator.sequence_parallel(layout)))
