"""`Adaptive` beside choices that the user has set, and inputs that the user keeps."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import WIDTH
from ranks import errors, run
from test_adaptive import layers_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import FlatDispatcher, Profile
from turnout.dispatch.autoselect.profile import Flop, Link
from turnout.moe import Adaptive, MoE, check, parallelize, place_experts, sync_gradients

SLOW = Profile(2, 1, Link(1e-4, 1e-4, 1e-7), Link(0.0, 0.0, 1e-3), Flop(1e-12))


def model_of(layers: int = 1, shared: bool = False):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    model = nn.Sequential(*[MoE(WIDTH, 4, 8, top_k=2, seed=0, balance=0.0) for _ in range(layers)])
    if shared:
        for layer in model:
            layer.experts = model[0].experts
    return parallelize(model, mesh, profile=SLOW, parallelism="auto"), mesh


def step(model, mesh, adaptive, x=None) -> None:
    model(torch.randn(40, WIDTH).requires_grad_() if x is None else x).sum().backward()
    sync_gradients(model, mesh)
    adaptive.step()


def set_by_hand() -> None:
    model, mesh = model_of()
    layer, adaptive, x = model[0], Adaptive(model, mesh, every=1, max_bytes=1), torch.randn(40, WIDTH).requires_grad_()
    layer.shadow = (7,)
    nn.init.zeros_(layer.gate.weight)  # all tokens choose the first experts
    for _ in range(3):
        step(model, mesh, adaptive, x)
        assert layer.shadow == (7,)
        assert not x._backward_hooks  # which would grow by one in each step
    layer.parallelism, layer.shadow = 0, range(5)
    layer.parallelism = layer.shadow = "auto"
    step(model, mesh, adaptive)  # both take more than max_bytes
    assert (layer.parallelism, layer.shadow) == (1, None)


def sharing() -> None:
    """Layers that share experts and want them in different orders: nothing moves."""
    model, mesh = model_of(layers=2, shared=True)
    for place, layer in enumerate(model):
        layer.parallelism, layer.shadow = 1, None
        nn.init.zeros_(layer.gate.weight)
        nn.init.ones_(layer.gate.weight[2 * place : 2 * place + 2, 0])
    adaptive = Adaptive(model, mesh, torch.optim.SGD(model.parameters()), every=1)
    x = torch.ones(40, WIDTH)
    for _ in range(2):
        (model[0](x).sum() + model[1](x).sum()).backward()
        sync_gradients(model, mesh)
        adaptive.step()
    assert model[0].experts.order == tuple(range(8))


def test_what_the_user_sets_stays_and_what_is_not_allowed_goes():
    run(2, set_by_hand)


def test_experts_that_layers_share_stay():
    run(2, sharing)


def shadowed_as_needed() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    model = nn.Sequential(MoE(WIDTH, 4, 8, capacity="as needed", seed=0, balance=0.0))
    parallelize(model, mesh, FlatDispatcher(mesh.get_group("ep"), equal_tokens=True))
    layers_of(model)[0].shadow = [3]
    model(torch.randn(40, WIDTH))


def test_a_capacity_that_follows_the_load_does_so_beside_shadowed_experts():
    assert all("set equal_tokens=False" in error for error in errors(2, shadowed_as_needed))


def late_and_wrong_optimizers() -> None:
    model, mesh = model_of()
    place_experts(model, mesh, None, {"0": [1, 0, 2, 3, 4, 5, 6, 7]})
    optimizer = torch.optim.AdamW(model.parameters())
    Adaptive(model, mesh, optimizer)
    check(model, mesh, optimizer)  # its state dict has experts by their ids
    with pytest.raises(ValueError, match="the number of optimizers is 0 on rank 0 and 1 on rank 1"):
        place_experts(model, mesh, [optimizer][: dist.get_rank()], {})  # or a state dict would wait for rank 0
    with pytest.raises(ValueError, match="no optimizer has w_up of layer 0"):
        Adaptive(model, mesh, torch.optim.SGD(model[0].gate.parameters()))
    with pytest.raises(ValueError, match="max_bytes must be a positive number of bytes, or None; got '1 GB'"):
        Adaptive(model, mesh, max_bytes="1 GB")


def test_optimizers_are_checked_before_the_first_step():
    run(2, late_and_wrong_optimizers)
