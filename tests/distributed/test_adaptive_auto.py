"""`Adaptive` on real ranks: it changes between steps what a layer does, alike on all ranks, and no result."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from cases import WIDTH, close, log_lines, tokens, whole
from ranks import run
from test_adaptive import SHARDS, alone, build, history, layers_of, same_history
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import AutoDispatcher, Profile
from turnout.dispatch.autoselect.profile import Flop, Link
from turnout.moe import Adaptive, MoE, load, parallelize, param_groups, place_experts, sync_gradients
from turnout.moe.parallel import adaptive_layer, decide
from turnout.moe.parallel import unstepped as unstepped_layers

SLOW = Link(1e-4, 1e-4, 1e-7)
CASES = {  # mesh, experts, profile of "ep"
    "ep": (((4,), ("ep",)), 8, Profile(4, 1, SLOW, SLOW, Flop(1e-9))),
    "slices": (((2, 2), ("ep", "etp")), 2, None),
    "nodes": (((2, 2), ("node", "local")), 8, Profile(2, 2, Link(1e-5, 1e-5, 1e-9), SLOW, Flop(1e-9))),
}


def switching(case: str, expected: list, x) -> list:
    """Five AdamW steps, of which each tries another choice."""
    (shape, names), experts, profile = CASES[case]
    decide.DOUBT = 1.0  # in this process alone: whatever was not tried may be faster
    mesh, rank, ranks = init_device_mesh("cpu", shape, mesh_dim_names=names), dist.get_rank(), dist.get_world_size()
    model = parallelize(build(experts), mesh, profile=profile, parallelism="auto")
    adaptive, layer, used = Adaptive(model, mesh, every=1), layers_of(model)[0], []

    def end_of_step() -> None:
        used.append((layer.parallelism, layer.shadow, getattr(layer.dispatcher, "chosen", None)))
        sync_gradients(model, mesh)
        adaptive.step()

    part = slice(sum(SHARDS[ranks][:rank]), sum(SHARDS[ranks][: rank + 1]))
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    seen = history(model, optimizer, x[part], None, ranks / len(x), lambda step: None, end_of_step)
    same_history(model, seen, expected, part)
    counts = load(model, mesh)  # is undisturbed by `Adaptive`
    assert all(int(each.tokens_per_expert.sum()) == 5 * min(2, experts) * len(x) for each in counts.values())
    reports = adaptive.reports
    assert all(report.measured > 0 and report.predicted > 0 for report in reports.values())
    assert sum(reports[layer.place.name].tokens_per_expert) == min(2, experts) * len(x)
    return [used, reports]


@pytest.mark.parametrize("case", CASES)
def test_a_choice_in_every_step_computes_what_one_rank_computes(case):
    experts, x = CASES[case][1], tokens(sum(SHARDS[4]))
    first, *others = run(4, switching, case, alone(build(experts), x, None), x)
    assert all(other == first for other in others)  # choices, and numbers
    assert len(set(first[0])) > 2


def told() -> tuple[list[str], list[int | None]]:
    """Tokens that are dear, on a slow link: weights travel from the second decision on. Then the user decides."""
    lines = log_lines()
    mesh, used = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)), []
    slow = Profile(2, 1, SLOW, Link(0.0, 0.0, 1e-3), Flop(1e-12))
    model = nn.Sequential(MoE(WIDTH, 4, 4, top_k=2, seed=0, balance=0.0))
    parallelize(model, mesh, profile=slow, parallelism="auto")
    adaptive, layer, x = Adaptive(model, mesh, every=2), model[0], tokens(256, torch.float32).requires_grad_()
    adaptive._layers["0"].timer.take = lambda: {0: 0.01, 1: 0.1}[layer.parallelism]  # seconds

    def step() -> None:
        layer(x).sum().backward()
        adaptive.step()
        used.append(layer.parallelism)

    for _ in range(8):
        step()
    copied = copy.deepcopy(layer)
    assert copied.parallelism == layer.parallelism
    layer.parallelism, layer.shadow = 1, None
    for _ in range(4):
        step()
    layer.parallelism, layer.shadow = "auto", "auto"
    for _ in range(2):
        step()
    assert isinstance(layer.dispatcher, AutoDispatcher)
    return lines, used


def test_it_says_what_it_changes_and_leaves_what_the_user_sets():
    (lines, used), (others, same) = run(2, told)
    assert used == same == [1] + [0] * 7 + [1] * 4 + [1, 0]
    assert others == []
    first, *more = [line for line in lines if line.startswith("layer")]
    assert first.startswith("layer 0: parallelism 1, flat in ")
    assert " -> parallelism 0; predicted " in first
    assert "measured 100 -> ? ms, for 256 tokens of a rank" in first
    assert [" -> parallelism 0; " in line for line in more].count(True) == 1  # free again


def test_on_one_rank_there_is_nothing_to_choose():
    model = nn.Sequential(MoE(WIDTH, 12, 8, seed=0, balance=0.0))
    adaptive = Adaptive(model, every=1)
    model(tokens(9, torch.float32)).sum().backward()
    adaptive.step()
    report = adaptive.reports["0"]
    assert (sum(report.tokens_per_expert), report.choice.parallelism, report.imbalance) == (18, 1, 0.0)
    with pytest.raises(ValueError, match="every must be a positive number of steps; got 0"):
        Adaptive(model, every=0)
    with pytest.raises(ValueError, match="Linear has no MoE layer: there is nothing to choose"):
        Adaptive(nn.Linear(2, 2))


def crowded() -> nn.Module:
    """Two layers whose tokens choose two experts of one rank."""
    model = build(8)
    for layer in layers_of(model):
        layer.gate.bias = nn.Parameter(torch.tensor([9.0, 9.0, *[0.0] * 6], dtype=torch.float64))
    return model


def moving(expected: list, x) -> tuple:
    """One of the two experts moves, with its optimizer state, and no result changes."""
    mesh, rank = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",)), dist.get_rank()
    model = parallelize(crowded(), mesh, "flat")
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    adaptive = Adaptive(model, mesh, optimizer, every=1)
    for each in adaptive._layers.values():
        each.costs = replace(
            each.costs, links=Profile(4, 1, SLOW, Link(0.0, 0.0, 1.0)), expert_bytes=1, learned_bytes=1
        )

    def end_of_step() -> None:
        sync_gradients(model, mesh)
        adaptive.step()  # moves gradients as well

    part = slice(sum(SHARDS[4][:rank]), sum(SHARDS[4][: rank + 1]))
    seen = history(model, optimizer, x[part], None, 4 / len(x), lambda step: None, end_of_step)
    *steps, last = expected
    for (y, gx, _), (y1, gx1, _) in zip(seen, steps, strict=True):
        close(y, y1[part], 1e-10, "y")
        close(gx / 4, gx1[part], 1e-10, "x.grad")
    orders = [layer.experts.order for layer in layers_of(model)]
    place_experts(model, mesh, optimizer, None)  # home
    for name, p in model.named_parameters():
        close(whole(p), last[name], 1e-9, name)
    return orders


def test_experts_move_where_that_pays_and_nothing_changes():
    x = tokens(sum(SHARDS[4]))
    found = run(4, moving, alone(crowded(), x, None), x)
    assert found == found[:1] * 4
    for order in found[0]:
        ranks = adaptive_layer.owners(order, 4)
        assert ranks[0] != ranks[1]


def replicas() -> tuple[list, list]:
    """Two groups share the experts, and their batches differ in size: the choices of the first batch, and then all."""
    mesh, rank = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep")), dist.get_rank()
    profile = Profile(2, 1, SLOW, Link(1e-5, 1e-5, 1e-8), Flop(1e-9))
    model = parallelize(
        nn.Sequential(MoE(WIDTH, 12, 8, seed=0, balance=0.0)), mesh, profile=profile, parallelism="auto"
    )
    adaptive, x, used = Adaptive(model, mesh, every=1), tokens(4 if rank < 2 else 400, torch.float32), []
    for _ in range(6):
        model(x.requires_grad_()).sum().backward()
        used.append((model[0].parallelism, model[0].shadow, model[0].dispatcher.chosen))
        adaptive.step()
    return used, [adaptive.reports]


def test_ranks_that_hold_the_same_experts_choose_alike():
    found = run(4, replicas)
    assert found[0][0][0] != found[2][0][0]  # each group for itself
    assert all((used[1:], reports) == (found[0][0][1:], found[0][1]) for used, reports in found)


def unstepped(steps: int) -> list[str]:
    """Warnings of a model with two layers in 8 forwards, of which 4 are enough."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    model = nn.Sequential(*(MoE(WIDTH, 4, 4, seed=0, balance=0.0) for _ in range(2)))
    parallelize(model, mesh, parallelism="auto")
    adaptive, most = Adaptive(model, mesh) if steps else None, unstepped_layers.FORWARDS
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        unstepped_layers.FORWARDS = 4
        for _ in range(8):
            model(tokens(3, torch.float32))
            if adaptive is not None:
                adaptive.step()
        unstepped_layers.FORWARDS = most
    return [str(each.message) for each in said]


def test_a_layer_that_waits_for_adaptive_in_vain_says_so_once():
    for said in run(2, unstepped, 0):
        (message,) = said
        assert message.startswith('parallelize(parallelism="auto") has left choices to Adaptive, but after 4 training')
        assert "layer 0" in message
        assert "call adaptive.step() after each optimizer step" in message
    assert run(2, unstepped, 1) == [[], []]
