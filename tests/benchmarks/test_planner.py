"""benchmarks/planner.py: constants that made some runs are found again from three of them, and predict the rest."""

from dataclasses import replace

import planner
import pytest
from planner import FITTED, LAYOUTS, Run, estimate, fit, table
from turnout.models.planner import Architecture, Cluster
from turnout.models.planner.volume import traffic


def made(cluster: Cluster) -> list[Run]:
    """Runs as a machine of these constants has them."""
    runs = []
    for ranks, flags in LAYOUTS:
        run = Run(ranks, flags, 0.0, 0.0, {})
        job = planner.job_of(run)
        sent = traffic(Architecture.of(job.config()), planner.layout_of(job, ranks))
        plan = estimate(cluster, run)
        runs.append(replace(run, seconds=plan.seconds, memory=plan.memory.total, sent=sent))
    return runs


def test_constants_are_found_from_three_runs():
    base = Cluster.load("laptop")
    device = base.device
    rates = {name: 0.5 * getattr(device, name) for name in ("half_tflops", "single_tflops", "memory_gbs")}
    inside = replace(base.inside, gbs=0.8 * base.inside.gbs, step_us=base.inside.step_us / 0.8)
    inside = replace(inside, message_us=inside.message_us / 0.8)
    software = replace(base.software, wrapper_us=2 * base.software.wrapper_us, reserve_gb=0.5)
    true = replace(base, device=replace(device, **rates), inside=inside, software=software, cores=2)
    runs = made(true)
    found = fit(runs, cores=2)
    assert found.device.single_tflops == pytest.approx(0.5 * device.single_tflops, rel=0.01)
    assert found.inside.gbs == pytest.approx(inside.gbs, rel=0.05)
    assert found.software.wrapper_us == pytest.approx(software.wrapper_us, rel=0.05)
    assert found.software.reserve_gb == pytest.approx(0.5, rel=0.01)
    for run in runs:
        assert estimate(found, run).seconds == pytest.approx(run.seconds, rel=0.02)
    shown = table(runs, found)
    assert len(shown.splitlines()) == 2 + len(LAYOUTS)
    assert shown.count("(fitted)") == len(FITTED)


def test_ranks_that_share_cores_take_turns():
    cluster = Cluster.load("laptop")
    run = Run(4, "--pp 2 --ep 2 --micro-batches 4", 0.0, 0.0, {})
    one, two, eight = (estimate(replace(cluster, cores=cores), run).seconds for cores in (1, 2, 8))
    assert one > 1.5 * two
    assert two > eight
