"""The runner itself: sound kernels run as on a GPU, planted bugs are seen."""

from pathlib import Path

import pytest
import runner
import torch
from runner import FORWARD, RANDOM, REVERSED, Runner, library
from turnout.cuda import launch

PLANTED = str(Path(__file__).with_name("planted.cu"))
SIGNATURES = {
    "reverse": "PPi",
    "reverse_dynamic": "PPi",
    "warp_sum": "PP",
    "outside_its_mask": "P",
    "rank_of_equals": "PPPf",
    "fill": "Pq",
    "fill_wide": "P",
}
ALL = ["reverse<true>", "reverse<false>", "reverse_dynamic", "warp_sum<true>", "warp_sum<false>", "outside_its_mask"]
ALL += ["rank_of_equals", "fill<true>", "fill<false>", "fill_wide"]
ORDERS = [FORWARD, REVERSED, RANDOM, RANDOM + 1]


@pytest.fixture(autouse=True)
def planted(monkeypatch, kernels_on_cpu):
    for name, signature in SIGNATURES.items():
        monkeypatch.setitem(launch.KERNELS, name, launch.Kernel(PLANTED, signature))
    monkeypatch.setitem(runner.INSTANCES, PLANTED, tuple(ALL))


def reverse(kernel, order, shared=0):
    launch.backends["cpu"] = Runner(order)
    values = torch.randperm(10_000)[:100].int()  # others each time: shared memory keeps those of the last launch
    out = torch.zeros_like(values)
    launch.launch(kernel, (1,), (100,), [values, out, 100], shared)
    return torch.equal(out, values.flip(0))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", ["reverse<true>", "reverse_dynamic"])
def test_barriers(kernel, order):
    assert reverse(kernel, order, shared=400)


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_is_seen(order):
    assert not reverse("reverse<false>", order)


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles(order):
    launch.backends["cpu"] = Runner(order)
    values, out = torch.arange(32.0), torch.zeros(1)
    launch.launch("warp_sum<true>", (1,), (32,), [values, out])
    assert out.item() == 496


@pytest.mark.parametrize("order", ORDERS)
def test_a_deadlock_is_reported(order):
    launch.backends["cpu"] = Runner(order)
    with pytest.raises(RuntimeError, match="deadlock"):
        launch.launch("warp_sum<false>", (1,), (32,), [torch.zeros(32), torch.zeros(1)])
    test_shuffles(order)  # and the next launch is not disturbed


def test_a_lane_outside_its_mask_is_reported():
    with pytest.raises(RuntimeError, match="not in its mask"):
        launch.launch("outside_its_mask", (1,), (32,), [torch.zeros(32, dtype=torch.int32)])


def test_match_and_atomics():
    values = torch.tensor([3, 1, 3, 3] * 8, dtype=torch.int32)
    rank, count = torch.zeros_like(values), torch.zeros(1, dtype=torch.int32)
    launch.launch("rank_of_equals", (7,), (32,), [values, rank, count, 0.0])
    assert rank.tolist() == [values[:i].eq(v).sum().item() for i, v in enumerate(values)]
    assert count.item() == 7


def test_blocks_are_at_most_1024_threads():
    with pytest.raises(RuntimeError, match="1024 threads; got 1025"):
        launch.launch("fill<true>", (1,), (1025,), [torch.zeros(5), 5])


def test_signatures_are_read_from_the_source():
    for kernel in ALL:
        assert library(kernel).signature(kernel) == SIGNATURES[kernel.partition("<")[0]]
