"""What starts before what when chunks overlap, forward and backward; the two halves of an exchange."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, close, tokens
from exchange_log import ExchangeLog
from ranks import run
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import (
    Dispatcher,
    FlatDispatcher,
    HierarchicalDispatcher,
    NodeDispatcher,
    OverlapDispatcher,
    Plan,
    all_to_all,
    all_to_all_start,
)
from turnout.dispatch.steps import Beside
from turnout.moe import MoE, aux_loss, parallelize


class Log(ExchangeLog):
    """Exchanges of rows, numbered in the order of their starts, and the experts, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.number = {"forward": 0, "backward": 0}
        self.phase = "forward"

    def name(self, x: Tensor, group: ProcessGroup | None) -> str:
        self.number[self.phase] += 1
        return str(self.number[self.phase] - 1)

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


# Chunks 0, 1, 2: out, experts, home, and in the backward the mirror image, which reads the same.
# Exchanges are numbered in the order of their starts.
TRIPS = """
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
        assert forward == words(TRIPS)
        assert backward == words(TRIPS)


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


def with_shared_experts(kind, degree: int) -> tuple[list[str], list[str]]:
    x, plan, weight = plan_of(6 + dist.get_rank())
    dispatcher = OverlapDispatcher(inner_of(kind), degree) if degree > 1 else inner_of(kind)
    with Log() as log:

        def shared() -> Tensor:
            log.events.append("shared")
            out = x * 2
            out.register_hook(lambda grad: log.events.append("shared"))
            return out

        beside = Beside(shared)
        y = dispatcher(x, plan, weight, log.experts, beside) + beside()
        forward, log.events, log.phase = log.events, [], "backward"
        y.sum().backward()
    return forward, log.events


@pytest.mark.parametrize("degree", [1, 2])
def test_shared_experts_run_while_rows_travel(degree):
    for forward, backward in run(2, with_shared_experts, FlatDispatcher, degree):
        for events in (forward, backward):
            assert events.count("shared") == 1
            place = events.index("shared")
            begun, over = ({e for e in events[:place] if e.startswith(word)} for word in ("start", "wait"))
            assert {e.replace("start", "wait") for e in begun} - over, f"nothing is under way: {events}"


def layer_with_shared_experts():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    torch.manual_seed(0)
    models = [MoE(WIDTH, 8, EXPERTS, shared=1, seed=0).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    parallelize(models[0], mesh)
    x = tokens(6).double()[3 * dist.get_rank() :][:3]
    results = []
    for model in models:
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        (y.square().sum() + aux_loss(model) * 0).backward()
        results.append((y, leaf.grad))
    for mine, theirs in zip(*results, strict=True):
        close(mine, theirs, 1e-12)


def test_a_layer_with_shared_experts_equals_one_rank():
    run(2, layer_with_shared_experts)
