"""The counting sort makes the plan that the sort in plain PyTorch makes, bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runner import FORWARD, RANDOM, REVERSED
from turnout.dispatch import Plan, kernels
from turnout.dispatch.plan import _plan, _sorted

MOST_EXPERTS = kernels.BINS // 2
KINDS = ("any", "some dropped", "one expert", "few experts", "all dropped")


def drawn(T, k, E, kind, seed=0):
    """Experts int64 [T, k], no one twice for a token."""
    generator = torch.Generator().manual_seed(seed)
    among = min(E, k + 1) if kind == "few experts" else E
    expert = torch.rand(T, among, generator=generator).argsort(1)[:, :k]
    if kind == "one expert":  # k of them, the last ones
        expert = torch.arange(E - k, E).expand(T, k)
    if kind == "some dropped":
        expert = torch.where(torch.rand(T, k, generator=generator) < 0.3, -1, expert)
    return torch.full_like(expert, -1) if kind == "all dropped" else expert.contiguous()


def same(device, expert, E, capacity=None):
    """Whether the kernels' token, slot and counts are those of plain PyTorch, dtypes included."""
    ours = kernels.plan(expert.to(device), E, capacity)
    pairs = zip(ours, _sorted(expert, E, capacity), strict=True)
    return all(torch.equal(a.cpu(), b) and a.dtype == b.dtype and a.is_contiguous() for a, b in pairs)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_plan_of_plain_pytorch(device, data):
    E = data.draw(st.integers(1, 70))
    k = data.draw(st.integers(1, min(E, 9)) | st.just(E))
    T, seed = data.draw(st.integers(0, 60)), data.draw(st.integers(0, 99))
    expert = drawn(T, k, E, data.draw(st.sampled_from(KINDS)), seed)
    capacity = data.draw(st.none() | st.integers(0, 5).map(lambda spare: busiest(expert, E) + spare))
    assert same(device, expert, E, capacity)


def busiest(expert, E):
    return int(_sorted(expert, E, None)[2].max())


# More than one block, more than one batch of loads for a warp, bins for fewer warps than there are, one warp only.
LARGE = [(1500, 4, 7), (2100, 8, 64), (600, 40, 40), (4200, 2, 4096), (3000, 1, MOST_EXPERTS), (40000, 1, 3)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "k", "E"), LARGE)
def test_many_blocks(device, T, k, E, kind):
    expert = drawn(T, k, E, kind) if E < 1000 else ids(T, k, E, kind)
    assert same(device, expert, E)
    assert same(device, expert, E, busiest(expert, E) + 1)


def ids(T, k, E, kind):
    """As `drawn`, without a matrix [T, E]: neighbours, which differ."""
    first = torch.randint(E, (T, 1), generator=torch.Generator().manual_seed(1))
    return (first + torch.arange(k)) % E if kind == "any" else drawn(T, k, k + 1, kind)


@pytest.mark.parametrize("order", [REVERSED, RANDOM, RANDOM + 1])
def test_in_any_order_of_threads_and_blocks(kernels_on_cpu, order):
    expert = drawn(1500, 4, 50, "some dropped")
    for kernels_on_cpu.order in (FORWARD, order):
        assert same("cpu", expert, 50)
        assert same("cpu", expert, 50, 150)


def test_the_comparison_can_fail(kernels_on_cpu):
    expert = drawn(100, 2, 5, "any")
    other = expert.clone()
    other[[3, 50]] = other[[50, 3]]
    assert not torch.equal(kernels.plan(other, 5, None)[1], _sorted(expert, 5, None)[1])


def test_the_operator_runs_two_kernels(kernels_on_cpu):
    expert = drawn(100, 2, 5, "any")
    plan = Plan.of(expert.t().contiguous().t(), 5, 60)  # of any strides
    assert kernels_on_cpu.launched == {"plan_count": 1, "plan_place": 1}
    assert torch.equal(plan.token, _sorted(expert, 5, 60)[0])
    Plan.of(expert, MOST_EXPERTS + 1)  # more than shared memory holds: plain PyTorch
    assert kernels_on_cpu.launched == {"plan_count": 1, "plan_place": 1}


def test_what_does_not_fit_goes_nowhere(device):
    expert = torch.tensor([[1], [7], [1], [-3], [1], [0]], device=device)  # 7 is no expert, 1 has too many
    token, slot, counts = kernels.plan(expert, 2, 2)
    assert slot.flatten().tolist() == [2, -1, 3, -1, -1, 0]
    assert token.tolist() == [5, -1, 0, 2]
    assert counts.tolist() == [2, 3]


@pytest.mark.parametrize("capacity", [None, 30])
def test_opcheck(device, capacity):
    for T in (0, 40):
        torch.library.opcheck(_plan, (drawn(T, 2, 5, "some dropped").to(device), 5, capacity))
