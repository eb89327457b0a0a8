"""Experts that come to their tokens: every `parallelism` and `shadow` computes what one rank computes."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from cases import WIDTH, close, perceptron, tokens, whole
from ranks import run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import OverlapDispatcher
from turnout.moe import Balance, Capacity, MoE, aux_loss, expert_parameters, parallelize, param_groups, sync_gradients

SHARDS = {2: [6, 3], 4: [5, 0, 9, 3], 8: [5, 0, 9, 3, 2, 2, 0, 4]}
STEPS = 5
ADAMW = partial(torch.optim.AdamW, lr=1e-2)


def build(experts: int, kind="swiglu", **options) -> nn.Module:
    """Two layers: hidden narrower than the model and wider, so that the router's weight multiplies one or the other."""
    torch.manual_seed(0)
    options = {"balance": Balance(over="global"), "bias": True, "seed": 3, **options}
    k = min(2, experts)
    narrow, wide = MoE(WIDTH, 12, experts, k, experts=kind, shared=1, **options), MoE(WIDTH, 24, experts, k, **options)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), narrow, nn.Linear(WIDTH, WIDTH), wide).double()


def layers_of(model: nn.Module) -> list[MoE]:
    return [layer for layer in model.modules() if isinstance(layer, MoE)]


def through(model: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    for layer in model:
        x = layer(x, mask) if isinstance(layer, MoE) else layer(x)
    return x


def history(model, optimizer, x: Tensor, mask: Tensor | None, scale: float, choose: Callable, sync: Callable) -> list:
    """Outputs, x gradients and parameter gradients of each step."""
    seen = []
    for step in range(STEPS):
        choose(step)
        optimizer.zero_grad()
        inputs = x.clone().requires_grad_()
        y = through(model, inputs, mask)
        (y.square().sum() * scale + aux_loss(model)).backward()
        sync()
        seen.append((y.detach(), inputs.grad, {n: whole(p.grad) for n, p in model.named_parameters()}))
        optimizer.step()
    return seen


def alone(model: nn.Module, x: Tensor, mask: Tensor | None, make: Callable = ADAMW) -> list:
    optimizer = make(model.parameters())
    seen = history(model, optimizer, x, mask, 1 / len(x), lambda step: None, lambda: None)
    return [*seen, {n: p.detach() for n, p in model.named_parameters()}]


def same_history(model: nn.Module, seen: list, expected: list, part: slice) -> None:
    """A rank's `history`, and its parameters after it, are those of `alone`, of which it had this part."""
    *steps, last = expected
    for (y, gx, grads), (y1, gx1, grads1) in zip(seen, steps, strict=True):
        close(y, y1[part], 1e-10, "y")
        close(gx / dist.get_world_size(), gx1[part], 1e-10, "x.grad")
        for name, grad in grads.items():
            close(grad, grads1[name], 1e-10, name)
    for name, p in model.named_parameters():
        close(whole(p), last[name], 1e-9, name)


def spread_out(shape, names, make: Callable, x, mask, expected, dispatcher, wrap, seed: int) -> set:
    """Five AdamW steps, each layer with another r and other shadowed experts in every step."""
    mesh, rank, ranks = init_device_mesh("cpu", shape, mesh_dim_names=names), dist.get_rank(), dist.get_world_size()
    model, drawn, chosen = parallelize(make(), mesh, dispatcher), random.Random(seed), set()
    slices = mesh["etp"].size() if "etp" in names else 1
    for layer in layers_of(model):
        layer.dispatcher = wrap(layer.dispatcher)
    allowed = [r for r in range(slices + 1) if r == 0 or slices % r == 0]
    storage = [(p, p.to_local().data_ptr()) for p in expert_parameters(model).values()]

    def choose(step: int) -> None:
        for place, layer in enumerate(layers_of(model)):
            layer.parallelism = allowed[(step + place + seed) % len(allowed)]
            some = drawn.sample(range(layer.num_experts), drawn.randrange(layer.num_experts + 1))
            layer.shadow = some if drawn.random() < 0.6 else None
            chosen.add((layer.parallelism, layer.shadow is not None))

    part = slice(sum(SHARDS[ranks][:rank]), sum(SHARDS[ranks][: rank + 1]))
    mine = x[part], None if mask is None else mask[part]
    optimizer = ADAMW(param_groups(model))
    seen = history(model, optimizer, *mine, ranks / len(x), choose, lambda: sync_gradients(model, mesh))
    same_history(model, seen, expected, part)
    assert all(p.to_local().data_ptr() == where for p, where in storage)  # parameters are where they were
    states = {id(p): p.to_local().numel() for p in expert_parameters(model).values()}
    for p, state in optimizer.state.items():
        assert id(p) not in states or state["exp_avg"].to_local().numel() == states[id(p)]
    return chosen


def same(dispatcher):
    return dispatcher


CASES = [
    # mesh, experts, kind of experts, options of the layers, dispatcher, what wraps it, masked
    (((1, 4), ("edp", "ep")), 8, "swiglu", {}, "flat", same, True),
    (((2, 2), ("edp", "ep")), 4, perceptron, {}, "flat", same, False),
    (((2, 2), ("ep", "etp")), 2, "gelu", {}, "flat", same, True),
    (((1, 4), ("ep", "etp")), 1, "swiglu", {}, "flat", same, False),
    (((1, 4), ("ep", "etp")), 3, "gelu", {"capacity": Capacity(3.0, pad=True)}, "flat", same, True),
    (((2, 2), ("node", "local")), 8, "gelu", {"capacity": 8.0}, "2dh", lambda d: OverlapDispatcher(d, 3), True),
    (((2, 2), ("node", "local")), 4, "swiglu", {"capacity": Capacity(4.0, pad=True)}, "node", same, True),
    (((2, 1, 2), ("node", "local", "etp")), 4, "gelu", {}, "node", lambda d: OverlapDispatcher(d, 2), False),
]


@pytest.mark.sampled
@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_choice_in_every_step_computes_what_one_rank_computes(case):
    (shape, names), experts, kind, options, dispatcher, wrap, masked = CASES[case]
    x = tokens(sum(SHARDS[4]))
    mask = torch.arange(len(x)) % 4 > 0 if masked else None

    def make():
        return build(experts, kind, **options)

    expected = alone(make(), x, mask)
    chosen = run(4, spread_out, shape, names, make, x, mask, expected, dispatcher, wrap, case)[0]
    assert len(chosen) > 2
