"""The planner on CPUs: host time of wrapped collectives, gloo's reduce-scatter, and ranks that share cores."""

from dataclasses import replace

import pytest
from turnout.models import GPTConfig
from turnout.models.planner import Architecture, Cluster, Estimator, Layout
from turnout.models.planner.links import Group

LAPTOP, SELENE = Cluster.load("laptop"), Cluster.load("selene")
MODEL = Architecture.of(GPTConfig(layers=4, dim=256, moe_every=0))


def with_software(**changes) -> Cluster:
    return replace(LAPTOP, software=replace(LAPTOP.software, **changes))


def test_gloo_scatters_sums_by_an_all_reduce():
    group, other = Group(LAPTOP, 2), Group(SELENE, 2)
    assert group.reduce_scatter(1e6) == group.all_reduce(1e6) > 1.5 * group.all_gather(1e6)
    assert other.reduce_scatter(1e6) == other.all_gather(1e6)


def test_a_wrapper_takes_its_time_for_each_exchange_of_tensor_parallelism():
    """Four exchanges of a dense block forward and backward, each a gather and a scatter, and one at either end."""
    layout = Layout(tp=2, micro_batch=4, micro_batches=2, dtype="fp32")
    slow = LAPTOP.software.wrapper_us + 1000
    before, after = (Estimator(MODEL, cluster, 8)(layout) for cluster in (LAPTOP, with_software(wrapper_us=slow)))
    exchanges = 2 * (4 * MODEL.layers + 2)
    assert after.breakdown.tp - before.breakdown.tp == pytest.approx(layout.micro_batches * exchanges * 1e-3)
    assert after.seconds - before.seconds == pytest.approx(after.breakdown.tp - before.breakdown.tp)
    assert Group(SELENE, 8).exchange(1e6) == Group(SELENE, 8).all_reduce(1e6)  # Megatron-LM has no wrapper


def test_zero_wraps_each_block_and_the_rest():
    slow = with_software(wrapper_us=LAPTOP.software.wrapper_us + 1000)
    for zero, number in ((0, 0), (1, 2), (2, 3), (3, 6)):  # 2 micro-batches: scattered once or twice, gathered 1 or 4 x
        layout = Layout(dp=2, micro_batch=2, micro_batches=2, zero=zero, dtype="fp32")
        before, after = (Estimator(MODEL, cluster, 8)(layout).breakdown.dp for cluster in (LAPTOP, slow))
        assert after - before == pytest.approx(number * (MODEL.layers + 1) * 1e-3), zero


def test_ranks_that_share_cores_take_as_long_as_the_cores_have_work():
    layout = Layout(dp=4, micro_batch=2, dtype="fp32")
    free, two, plenty = (Estimator(MODEL, replace(LAPTOP, cores=cores), 8)(layout) for cores in (0, 2, 8))
    assert free.breakdown.cores == plenty.breakdown.cores == 0
    assert two.seconds == pytest.approx(2 * free.seconds)
    assert "cores" in two.to_json()["breakdown"]
    piped = Layout(pp=4, micro_batch=2, micro_batches=4, dtype="fp32")  # a bubble costs nothing: others compute in it
    alone, shared = (Estimator(MODEL, replace(LAPTOP, cores=cores), 8)(piped) for cores in (4, 1))
    assert alone.seconds < shared.seconds < 4 * alone.seconds
