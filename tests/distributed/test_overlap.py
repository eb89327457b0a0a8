"""Chunks that overlap: what starts before what, the same drops, a degree that all ranks choose alike."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, close, tokens, whole
from ranks import errors, run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from turnout.dispatch import Dispatcher, FlatDispatcher, LocalDispatcher, OverlapDispatcher, Plan, overlap
from turnout.moe import Capacity, MoE, fully_shard_experts, parallelize, sync_gradients

pytestmark = pytest.mark.sampled

UNEVEN = [7, 0, 9, 1]


def layer(dispatcher: str = "flat", **options) -> MoE:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    (moe,) = parallelize(
        nn.ModuleList([MoE(WIDTH, 12, EXPERTS, top_k=3, seed=0, balance=0, **options)]).double(),
        mesh,
        dispatcher,
    )
    return moe


def mine(sizes: list[int] = UNEVEN) -> Tensor:
    return tokens(sum(sizes)).split(sizes)[dist.get_rank()].clone()


def outcome(moe: MoE, x: Tensor) -> list[Tensor]:
    """y, the gradient of x, and every parameter's."""
    moe.zero_grad()
    x = x.clone().requires_grad_()
    y = moe(x)
    (y * torch.arange(WIDTH)).sum().backward()
    grads = [whole(torch.zeros_like(p) if p.grad is None else p.grad) for p in moe.parameters()]
    return [y.detach(), x.grad, *grads]


def check_drops(dispatcher: str, options: dict) -> int:
    moe, x = layer(dispatcher, **options), mine()
    expected = outcome(moe, x)
    dropped = int(moe.stats.dropped * 1000)
    inner = moe.dispatcher
    for degree in (1, 2, 3, 4, 11):
        moe.dispatcher = OverlapDispatcher(inner, degree)
        for actual, wanted in zip(outcome(moe, x), expected, strict=True):
            close(actual, wanted, 1e-12)
        assert torch.equal(outcome(moe, x)[0] == 0, expected[0] == 0)  # rows of tokens dropped everywhere
    return dropped


@pytest.mark.parametrize("dispatcher", ["flat", "2dh", "node"])
@pytest.mark.parametrize("policy", ["score", "position"])
@pytest.mark.parametrize("pad", [False, True])
def test_what_is_dropped_does_not_depend_on_the_chunks(dispatcher, policy, pad):
    options = {"capacity": Capacity(0.5, drop=policy, pad=pad)}
    assert max(run(4, check_drops, dispatcher, options)) > 0


def plan_of(number: int) -> tuple[Tensor, Plan, Tensor]:
    g = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(number, WIDTH, generator=g, dtype=torch.float64).requires_grad_()
    expert = torch.rand(number, EXPERTS, generator=g).argsort(1)[:, :2].contiguous()
    return x, Plan.of(expert, EXPERTS), torch.rand(number, 2, generator=g, dtype=torch.float64)


class Plain(Dispatcher):
    """A user's own, with `dispatch` and `combine` alone."""

    def __init__(self) -> None:
        self.inner = FlatDispatcher(dist.group.WORLD)

    def dispatch(self, x, plan, weight):
        return self.inner.dispatch(x, plan, weight)

    def combine(self, rows, receipt):
        return self.inner.combine(rows, receipt)

    def refuse(self, num_experts, device, place=None):
        self.inner.refuse(num_experts, device, place)


def not_in_steps() -> None:
    moe, x = layer(), mine()
    expected = outcome(moe, x)
    moe.dispatcher = OverlapDispatcher(Plain(), 3)
    for actual, wanted in zip(outcome(moe, x), expected, strict=True):
        close(actual, wanted, 1e-12)


def refused_by_one(dispatcher: str) -> None:
    moe = layer()
    moe.dispatcher = OverlapDispatcher(Plain() if dispatcher == "plain" else moe.dispatcher, 3)
    try:
        moe(mine()[:, : WIDTH - (dist.get_rank() == 2)])
    finally:
        dist.all_reduce(torch.ones(1))  # the group is in step afterwards
        OverlapDispatcher(FlatDispatcher(dist.group.WORLD), 2)(*plan_of(4), lambda rows, weight, counts: rows)


def test_a_dispatcher_that_is_not_in_steps_goes_chunk_after_chunk():
    run(4, not_in_steps)


@pytest.mark.parametrize("dispatcher", ["plain", "in steps"])
def test_after_a_refusal_all_ranks_are_in_step(dispatcher):
    found = errors(4, refused_by_one, dispatcher)
    assert found[2].startswith(f"ValueError: x must be (..., {WIDTH})")
    for rank in (0, 1, 3):
        assert found[rank].startswith("DispatchError: layer '0': rank 2 of the expert group raised an error")


def clocked(costs: dict[int, dict[int, float]], checkpointed: bool) -> list[int]:
    """The degrees of 12 steps where steps cost what `costs[rank][degree]` says."""
    now, used = [0.0], []
    overlap.time = SimpleNamespace(perf_counter=lambda: now[0])
    moe, x = layer(), mine()
    moe.dispatcher = OverlapDispatcher(moe.dispatcher, "auto")
    with torch.no_grad():
        moe(x)  # no step
    cut = overlap._cut
    overlap._cut = lambda x, plan, weight, degree: used.append(degree) or cut(x, plan, weight, degree)
    for step in range(12):
        used.append(1)  # nothing is cut then
        y = x.clone().requires_grad_()
        for _ in range(2):  # two layers, one dispatcher
            y = checkpoint(moe, y, use_reentrant=False) if checkpointed else moe(y)
        y.sum().backward()
        now[0] += costs[dist.get_rank()][max(used[step:])] if step % 3 else 1000.0  # the first is not counted
        used[step:] = [max(used[step:])]
    return used


def again(costs: list[dict[int, float]]) -> list[int]:
    """The degrees of as many trials, one after the other, each with its own costs of a step."""
    trial, now, chosen = overlap._Trial(), [0.0], []
    overlap.time = SimpleNamespace(perf_counter=lambda: now[0])
    group = (dist.group.WORLD,)
    for cost in costs:
        for _ in range(trial.AGAIN):
            trial.new_step = True  # as after a backward
            degree = trial.degree(torch.device("cpu"), group)
            now[0] += cost[degree]
        chosen.append(degree)
    return chosen


def test_auto_tries_again_and_noise_changes_nothing():
    noise = [{1: 5.0, 2: 3.0, 4: 3.1}, {1: 5.0, 2: 3.1, 4: 3.0}, {1: 3.05, 2: 3.1, 4: 3.0}]
    links_are_slower = {1: 5.0, 2: 3.0, 4: 2.0}
    assert run(2, again, [*noise, links_are_slower, noise[0]]) == [[2, 2, 2, 4, 4]] * 2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_auto_tries_and_keeps_what_is_fastest_on_the_slowest_rank(checkpointed):
    costs = {rank: {1: 5.0, 2: 3.0, 4: 4.0} for rank in range(4)}
    tried = [1] * 3 + [2] * 3 + [4] * 3
    assert run(4, clocked, costs, checkpointed) == [tried + [2] * 3] * 4
    costs[3] = {1: 5.0, 2: 6.0, 4: 4.5}
    assert run(4, clocked, costs, checkpointed) == [tried + [4] * 3] * 4
    costs[1] = {1: 7.0, 2: 7.0, 4: 7.0}
    assert run(4, clocked, costs, checkpointed) == [tried + [1] * 3] * 4


def sharded() -> None:
    """Experts under FSDP2 run once a chunk and have the gradient of all chunks."""
    results = []
    for wrap in (False, True):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
        model = nn.Sequential(MoE(WIDTH, 12, EXPERTS, seed=0)).double()
        model[0].gate.weight.data.copy_(tokens(EXPERTS))
        moe = parallelize(model, mesh)[0]
        moe.dispatcher = OverlapDispatcher(moe.dispatcher, 3) if wrap else moe.dispatcher
        if wrap:
            fully_shard_experts(model, mesh)
            fully_shard(model, mesh=mesh._flatten("all"))
        model(mine()).square().sum().backward()
        if not wrap:
            sync_gradients(model, mesh)
        results.append([whole(p.grad) for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        close(b, a, 1e-9)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
def test_chunks_under_fsdp():
    run(4, sharded)


def test_one_rank_alone_may_compute_in_chunks():
    torch.manual_seed(0)
    moe = MoE(WIDTH, 12, EXPERTS, capacity=Capacity(1.0, pad=True), balance=0).double()
    expected = outcome(moe, tokens(9))
    moe.dispatcher = OverlapDispatcher(LocalDispatcher(), 4)
    for actual, wanted in zip(outcome(moe, tokens(9)), expected, strict=True):
        close(actual, wanted, 1e-12)


@pytest.mark.parametrize("degree", [0, -1, 2.0, "many"])
def test_a_bad_degree_is_named(degree):
    with pytest.raises(ValueError, match="degree must be a positive integer"):
        OverlapDispatcher(LocalDispatcher(), degree)
