"""Experts change their ranks between steps: the model computes what one rank computes, and only what moves travels."""

from __future__ import annotations

import random
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, close, perceptron, tokens, whole
from ranks import run
from test_adaptive import SHARDS, STEPS, alone, build, layers_of, through
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from turnout.dispatch import OverlapDispatcher
from turnout.moe import (
    Capacity,
    MoE,
    aux_loss,
    check,
    check_replicas,
    clip_grad_norm_,
    fully_shard_experts,
    load,
    parallelize,
    param_groups,
    place_experts,
    plan_placement,
    sync_gradients,
)

OPTIMIZERS = {
    "default": partial(torch.optim.AdamW, lr=1e-2, amsgrad=True),
    "foreach": partial(torch.optim.AdamW, lr=1e-2, foreach=True),
    "fused": partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "sgd": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
}


def mesh_of(shape, names):
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def drawn(model: nn.Module, random: random.Random) -> dict[str, list[int]]:
    """A random order for some layers."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MoE)}
    return {name: random.sample(range(m.num_experts), m.num_experts) for name, m in layers.items()}


def by_id(model: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter, its gradient or state, whole and with experts in the order of their ids."""
    layer, experts, _ = name.partition(".experts.")
    full = whole(tensor)
    return full[torch.tensor(model.get_submodule(layer).experts.order).argsort()] if experts else full


def moving(shape, names, make, x, mask, expected, dispatcher, wrap, kind, shard: bool) -> None:
    """Five steps, with other orders, r and shadows before each."""
    mesh, rank, ranks = mesh_of(shape, names), dist.get_rank(), dist.get_world_size()
    model, draw = parallelize(make(), mesh, dispatcher), random.Random(0)
    for layer in layers_of(model):
        layer.dispatcher = wrap(layer.dispatcher)
    if shard:
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        options = {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float64)}
        fully_shard(fully_shard_experts(model, mesh, **options), mesh=mesh._flatten("all"), **options)
    optimizer = OPTIMIZERS[kind](param_groups(model))
    part = slice(sum(SHARDS[ranks][:rank]), sum(SHARDS[ranks][: rank + 1]))
    kept = {id(p) for p in model.parameters()}
    for step in range(STEPS):
        place_experts(model, mesh, optimizer, drawn(model, draw) if step != 3 else None)
        for layer in layers_of(model):
            layer.parallelism = draw.choice([0, 1])
            layer.shadow = draw.sample(range(layer.num_experts), draw.randrange(layer.num_experts))
        inputs = x[part].clone().requires_grad_()
        optimizer.zero_grad()
        y = model(inputs) if mask is None else through(model, inputs, mask[part])
        (y.square().sum() * (ranks / len(x)) + aux_loss(model)).backward()
        if not shard:
            sync_gradients(model, mesh)
        y1, gx1, grads1 = expected[step]
        close(y.detach(), y1[part], 1e-10, "y")
        close(inputs.grad / ranks, gx1[part], 1e-10, "x.grad")
        for name, p in model.named_parameters():
            close(by_id(model, name, p.grad), grads1[name], 1e-10, name)
        if step == STEPS - 1:
            check(model, mesh, optimizer)
            norm = torch.stack([g.norm() for g in grads1.values()]).norm()
            close(clip_grad_norm_(model, 1e9), norm, 1e-10, "norm")
        optimizer.step()
    assert {id(p) for p in model.parameters()} == kept
    check_replicas(model)
    for name, value in model.state_dict().items():  # of one rank, in the order of ids
        close(whole(value), expected[-1][name], 1e-9, name)


def same(dispatcher):
    return dispatcher


CASES = [
    # mesh, experts, kind of experts, options of the layers, dispatcher, what wraps it, masked, optimizer, FSDP2
    (((2, 1, 2), ("node", "local", "etp")), 4, "gelu", {}, "node", lambda d: OverlapDispatcher(d, 2), 0, "fused", 0),
    (((4,), ("ep",)), 8, "swiglu", {}, "flat", same, True, "default", False),
    (((2, 2), ("edp", "ep")), 8, "swiglu", {}, "flat", same, False, "foreach", True),
    (
        ((2, 2), ("node", "local")),
        8,
        perceptron,
        {"capacity": Capacity(8.0, pad=True)},
        "2dh",
        same,
        True,
        "sgd",
        False,
    ),
]


@pytest.mark.sampled
@pytest.mark.parametrize("case", range(len(CASES)))
def test_with_a_placement_in_every_step_a_model_computes_what_one_rank_computes(case):
    (shape, names), experts, kind, options, dispatcher, wrap, masked, optimizer, shard = CASES[case]
    x = tokens(sum(SHARDS[4]))
    mask = torch.arange(len(x)) % 4 > 0 if masked else None

    def make():
        return build(experts, kind, **options)

    expected = alone(make(), x, mask, OPTIMIZERS[optimizer])
    run(4, moving, shape, names, make, x, mask, expected, dispatcher, wrap, optimizer, shard)


def received(layers: list[MoE], forward) -> list[list[int]]:
    """Rows that the experts of each rank get in a forward, for each layer."""
    rows: list[int] = []
    hooks = [
        layer.experts.register_forward_pre_hook(lambda _, given: rows.append(int(given[2].sum()))) for layer in layers
    ]
    forward()
    for hook in hooks:
        hook.remove()
    everyones = [[]] * dist.get_world_size()
    dist.all_gather_object(everyones, rows)
    return list(zip(*everyones, strict=True))


def balanced() -> tuple[float, float]:
    """Max / mean rows of a rank before and after."""
    mesh = mesh_of((4,), ("ep",))
    layer = MoE(WIDTH, 12, EXPERTS, top_k=2, balance=0.0, seed=0).double()
    with torch.no_grad():
        layer.gate.weight.copy_(tokens(EXPERTS) + torch.linspace(0.5, 0.0, EXPERTS).unsqueeze(1))  # first ones are hot
    model = parallelize(nn.Sequential(layer), mesh)
    x = (tokens(400) + 0.5).chunk(4)[dist.get_rank()]
    (before,) = received([layer], lambda: model(x))
    counts = load(model, mesh)["0"].tokens_per_expert
    plan = plan_placement(counts, ranks=4)
    place_experts(model, mesh, torch.optim.SGD(model.parameters()), {"0": plan.order})
    (after,) = received([layer], lambda: model(x))
    assert list(after) == list(plan.rank_loads)
    assert torch.equal(load(model, mesh)["0"].tokens_per_expert, counts)  # ids are global
    return max(before) / (sum(before) / 4), max(after) / (sum(after) / 4)


def test_ranks_get_the_rows_that_the_planner_foretells():
    before, after = run(4, balanced)[0]
    assert before > 1.5
    assert after < 1.1
