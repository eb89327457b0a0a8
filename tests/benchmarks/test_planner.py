"""benchmarks/planner.py: constants that made some runs are found again from two of them, and predict the rest."""

from dataclasses import replace

import planner
import pytest
from planner import LAYOUTS, Run, estimate, fit, step, table
from turnout.models.planner import Architecture, Cluster
from turnout.models.planner.volume import traffic


def made(cluster: Cluster, cores: int) -> list[Run]:
    """Runs as a machine of these constants has them."""
    runs = []
    for ranks, flags in LAYOUTS:
        run = Run(ranks, flags, 0.0, 0.0, {})
        job = planner.job_of(run)
        sent = traffic(Architecture.of(job.config()), planner.layout_of(job, ranks))
        memory = estimate(cluster, run).memory.total
        runs.append(replace(run, seconds=step(cluster, cores, run), memory=memory, sent=sent))
    return runs


def test_constants_are_found_from_two_runs():
    base = Cluster.load("laptop")
    device = replace(base.device, single_tflops=0.03, half_tflops=0.015, memory_gbs=2.0, kernel_us=20.0)
    inside = replace(base.inside, gbs=1.0, step_us=75.0, message_us=15.0)
    true = replace(base, device=device, inside=inside, software=replace(base.software, reserve_gb=0.5))
    runs = made(true, cores=2)
    found = fit(runs, cores=2)
    assert found.device.single_tflops == pytest.approx(0.03, rel=0.01)
    assert found.inside.gbs == pytest.approx(1.0, rel=0.05)
    assert found.software.reserve_gb == pytest.approx(0.5, rel=0.01)
    for run in runs:
        assert step(found, 2, run) == pytest.approx(run.seconds, rel=0.02)
    shown = table(runs, found, 2)
    assert len(shown.splitlines()) == 2 + len(LAYOUTS)
    assert "(fitted)" in shown


def test_ranks_that_share_cores_take_turns():
    cluster = Cluster.load("laptop")
    run = Run(4, "--pp 2 --ep 2 --micro-batches 4", 0.0, 0.0, {})
    assert step(cluster, 1, run) > 1.9 * step(cluster, 2, run)
    assert step(cluster, 8, run) == estimate(cluster, run).seconds  # cores for all: the bubble counts
