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
from turnout.dispatch import (
    Dispatcher,
    FlatDispatcher,
    HierarchicalDispatcher,
    LocalDispatcher,
    NodeDispatcher,
    OverlapDispatcher,
    Plan,
    all_to_all,
    all_to_all_start,
    overlap,
)
from turnout.moe import MoE, fully_shard_experts, parallelize, sync_gradients

UNEVEN = [7, 0, 9, 1]


def layer(dispatcher: str = "flat", **options) -> MoE:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    (moe,) = parallelize(
        nn.ModuleList([MoE(WIDTH, 12, EXPERTS, top_k=3, seed=0, **options)]).double(), mesh, dispatcher
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
    options = {"capacity_factor": 0.5, "drop_policy": policy, "pad": pad}
    assert max(run(4, check_drops, dispatcher, options)) > 0


class Log:
    """The order of events on a rank: exchanges of rows begun and waited for, experts forward and backward."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.number = {"forward": 0, "backward": 0}
        self.phase = "forward"
        self.exchange = dist.all_to_all_single

    def __enter__(self) -> Log:
        dist.all_to_all_single = self.begin
        return self

    def __exit__(self, *_) -> None:
        dist.all_to_all_single = self.exchange

    def begin(self, out: Tensor, x: Tensor, *args, **kwargs):
        work = self.exchange(out, x, *args, **kwargs)
        if x.ndim < 2 or not x.is_floating_point():
            return work  # sizes, weights, numbers of experts
        number = self.number[self.phase]
        self.number[self.phase] += 1
        self.events.append(f"start {number}")
        return SimpleNamespace(wait=lambda: (self.events.append(f"wait {number}"), work.wait()))

    def experts(self, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        self.events.append("experts")
        out = rows * weight.unsqueeze(1)
        out.register_hook(lambda grad: self.events.append("experts"))
        return out


def plan_of(number: int) -> tuple[Tensor, Plan, Tensor]:
    g = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(number, WIDTH, generator=g, dtype=torch.float64).requires_grad_()
    expert = torch.rand(number, EXPERTS, generator=g).argsort(1)[:, :2].contiguous()
    return x, Plan.of(expert, EXPERTS), torch.rand(number, 2, generator=g, dtype=torch.float64)


def inner_of(kind) -> Dispatcher:
    if kind is FlatDispatcher:
        return FlatDispatcher(dist.group.WORLD)
    return kind.of(init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local")))


def logged(kind, degree: int) -> tuple[list[str], list[str]]:
    x, plan, weight = plan_of(6 + dist.get_rank())
    with Log() as log:
        y = OverlapDispatcher(inner_of(kind), degree)(x, plan, weight, log.experts)
        forward, log.events, log.phase = log.events, [], "backward"
        y.sum().backward()
    return forward, log.events


# Chunks 0, 1, 2: out, experts, home. Exchanges are numbered in the order of their starts.
FORWARD = """
start 0
start 1 | wait 0 experts start 2
start 3 | wait 1 experts start 4 | wait 2
wait 3 experts start 5 | wait 4
wait 5
"""
BACKWARD = """
start 0
start 1 | wait 0 experts start 2
start 3 | wait 1 experts start 4 | wait 2
wait 3 experts start 5 | wait 4
wait 5
"""


def words(text: str) -> list[str]:
    parts = text.replace("|", " ").split()
    return [f"{a} {parts[i + 1]}" if a in ("start", "wait") else a for i, a in enumerate(parts) if not a.isdigit()]


def test_the_next_chunk_travels_before_this_one_is_computed():
    for forward, backward in run(4, logged, FlatDispatcher, 3):
        assert forward == words(FORWARD)
        assert backward == words(BACKWARD)


def test_in_one_piece_every_start_is_waited_for_at_once():
    plain = words("start 0 wait 0 experts start 1 wait 1")
    assert run(4, logged, FlatDispatcher, 1) == [(plain, plain)] * 4


@pytest.mark.parametrize("kind", [HierarchicalDispatcher, NodeDispatcher])
def test_with_two_exchanges_each_way_they_are_under_way_while_experts_compute(kind):
    for trip in run(4, logged, kind, 5):
        for events in trip:
            under_way, seen = set(), []
            for event in events:
                what, _, number = event.partition(" ")
                if what == "experts":
                    seen.append(len(under_way))
                elif what == "start":
                    under_way.add(number)
                else:
                    under_way.remove(number)
            assert len(seen) == 5
            assert min(seen) >= 1, events  # always something
            assert max(seen) >= 2, events
            assert not under_way


def halves() -> None:
    """The two halves are the whole, in the second derivative, too."""
    rank = dist.get_rank()
    send, recv = [1, 2, 0, rank], [[1, 2, 0, r][rank] for r in range(4)]
    results = []
    for whole_trip in (True, False):
        x = tokens(sum(send)).requires_grad_()
        if whole_trip:
            (y,) = all_to_all(x, send=send, recv=recv, group=None)
        else:
            travel = all_to_all_start(x, send=send, recv=recv, group=None)
            (y,) = travel.wait()
        (grad,) = torch.autograd.grad((y**3).sum() * (rank + 1), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
        results.append((y.detach(), grad.detach(), second))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    been = torch.cat([torch.full((n,), w + 1.0) for w, n in enumerate(send)]).unsqueeze(1).double()
    close(results[0][1], 3 * x.detach().square() * been, 1e-12)
    close(results[0][2], 36 * x.detach() ** 3 * been.square(), 1e-10)


def test_the_halves_of_an_exchange_are_the_whole():
    run(4, halves)


class Plain(Dispatcher):
    """A user's own, with `dispatch` and `combine` alone."""

    def __init__(self) -> None:
        self.inner = FlatDispatcher(dist.group.WORLD)

    def dispatch(self, x, plan, weight):
        return self.inner.dispatch(x, plan, weight)

    def combine(self, rows, receipt):
        return self.inner.combine(rows, receipt)

    def refuse(self, num_experts, device):
        self.inner.refuse(num_experts, device)


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
    found = errors(4, refused_by_one, dispatcher, timeout=30)
    assert found[2].startswith(f"ValueError: x must be (..., {WIDTH})")
    for rank in (0, 1, 3):
        assert found[rank].startswith("DispatchError: rank 2 of the expert group: raised an error")


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
    moe = MoE(WIDTH, 12, EXPERTS, capacity_factor=1.0, pad=True).double()
    expected = outcome(moe, tokens(9))
    moe.dispatcher = OverlapDispatcher(LocalDispatcher(), 4)
    for actual, wanted in zip(outcome(moe, tokens(9)), expected, strict=True):
        close(actual, wanted, 1e-12)


@pytest.mark.parametrize("degree", [0, -1, 2.0, "many"])
def test_a_bad_degree_is_named(degree):
    with pytest.raises(ValueError, match="degree must be a positive integer"):
        OverlapDispatcher(LocalDispatcher(), degree)
