"""float16 with loss scaling: what overflows on one rank is skipped on all, and the rest trains as in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, tokens, whole
from ranks import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from turnout.dispatch import Meshes
from turnout.models import GPT, GPTConfig, next_token_loss, parallel_model
from turnout.models.data_parallel import computed_in
from turnout.moe import GradScaler, MoE, aux_loss, clip_grad_norm_, parallelize, param_groups, sync_gradients
from turnout.moe.experts.sharded import local
from turnout.moe.parallel.fsdp import fully_shard_experts
from turnout.moe.parallel.parallelize import expert_parameters


def finish(scaler: GradScaler, optimizer: torch.optim.Optimizer, model: nn.Module) -> float:
    """The end of a step, and the scale of the next."""
    scaler.unscale_(optimizer)
    clip_grad_norm_(model, 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return scaler.get_scale()


def trained(steps: int, spoil: int | None = None, half: bool = True) -> tuple[list[float], list[torch.Tensor]]:
    """Scales after each step and final parameters; in step `spoil` an expert's gradient of rank 1 overflows."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("edp", "ep"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), MoE(WIDTH, 24, EXPERTS), nn.Linear(WIDTH, 1))
    parallelize(model, mesh)
    optimizer = torch.optim.SGD(param_groups(model), lr=0.1)
    scaler = GradScaler("cpu", init_scale=256.0, growth_interval=2, enabled=half)
    x, scales = tokens(24, torch.float32).split([10, 14])[dist.get_rank()], []
    for number in range(steps):
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = model(x).square().mean() + aux_loss(model)
        scaler.scale(loss).backward()
        if number == spoil and dist.get_rank() == 1:
            model[1].experts.w_up.grad._local_tensor[0, 0, 0] = float("inf")
        sync_gradients(model, mesh)
        scales.append(finish(scaler, optimizer, model))
    return scales, [whole(p) for p in model.parameters()]


def test_an_overflow_on_one_rank_skips_the_step_on_all():
    for scales, parameters in run(2, trained, 3, 1):
        assert scales == [256.0, 128.0, 128.0]
        for actual, expected in zip(parameters, run(2, trained, 2)[0][1], strict=True):
            assert (actual - expected).abs().max() < 1e-4  # of three steps, two; the second with half the scale


def test_the_scale_grows_and_training_is_that_of_float32():
    for (scales, parameters), (_, expected) in zip(run(2, trained, 4), run(2, trained, 4, None, False), strict=True):
        assert scales == [256.0, 512.0, 512.0, 1024.0]
        for actual, wanted in zip(parameters, expected, strict=True):
            assert (actual - wanted).abs().max() < 2e-3 * max(1, wanted.abs().max())


def gpt(compute: str) -> tuple[nn.Module, Callable[[torch.Tensor, float], torch.Tensor]]:
    """A model on two ranks, and its step: (tokens, scale) -> loss.

    `compute`: "float32"; "autocast" to float16; or "sharded", with FSDP2's float16 copies of float32 parameters.
    """
    config = GPTConfig(vocab=16, dim=16, layers=2, heads=2, hidden=24, seq_len=8, num_experts=4)
    meshes = Meshes.of("cpu", ep=1 if compute == "sharded" else 2)
    torch.manual_seed(0)
    if compute != "sharded":
        model = parallel_model(config, meshes)
        if compute == "autocast":
            computed_in(torch.float16, model.parts[0], "cpu")
        return model, lambda tokens, scale: model.step(tokens[:, :-1], tokens[:, 1:], scale).task

    model = parallelize(GPT(config), meshes)
    policy = MixedPrecisionPolicy(torch.float16, torch.float32, cast_forward_inputs=False)
    fully_shard_experts(model, meshes, mp_policy=policy)
    fully_shard(model, mesh=meshes.tokens, mp_policy=policy, ignored_params=set(expert_parameters(model).values()))

    def step(tokens, scale):
        task = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
        ((task + aux_loss(model)) * scale).backward()
        return task.detach()

    return model, step


def steps(compute: str, spoil: int | None = None, skip: int | None = None):
    """Losses and scales of four steps, the last parameters, and how far they have come.

    In step `spoil` gradients of rank 1's experts overflow, step `skip` is left out.
    """
    model, step = gpt(compute)
    optimizer = torch.optim.SGD(param_groups(model), lr=0.5, momentum=0.9)
    scaler = GradScaler("cpu", init_scale=2.0**12, growth_interval=2, enabled=compute != "float32")
    start, losses, scales = [whole(p) for p in model.parameters()], [], []
    for number in set(range(4)) - {skip}:
        tokens = torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(number)).chunk(2)[dist.get_rank()]
        losses.append(float(step(tokens, float(scaler.scale(torch.ones(()))))))
        if number == spoil and dist.get_rank() == 1:
            local(next(iter(expert_parameters(model).values())).grad).flatten()[0] = float("inf")
        scales.append(finish(scaler, optimizer, model))
    parameters = [whole(p) for p in model.parameters()]
    return losses, scales, parameters, [p - was for p, was in zip(parameters, start, strict=True)]


@pytest.mark.parametrize("compute", ["autocast", "sharded"])
def test_a_gpt_in_float16_goes_on_after_an_overflow(compute):
    ranks = zip(run(2, steps, compute, 1), run(2, steps, "float32", None, 1), strict=True)
    for (losses, scales, parameters, _), (wanted, _, expected, moved) in ranks:
        assert scales == [4096.0, 2048.0, 2048.0, 4096.0]
        assert [losses[0], *losses[2:]] == pytest.approx(wanted, abs=2e-3)
        for p, q, way in zip(parameters, expected, moved, strict=True):
            assert p.dtype == torch.float32
            assert (p - q).norm() < 0.05 * way.norm()


def test_gradients_in_float16_are_refused():
    model = nn.Linear(2, 1).half()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 2).half()).sum()).backward()
    with pytest.raises(ValueError, match="keep parameters in float32"):
        scaler.unscale_(optimizer)


def test_a_loss_may_be_scaled_by_the_factor_alone():
    model = nn.Linear(2, 1)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), GradScaler("cpu", init_scale=256.0)
    (model(torch.ones(1, 2)).sum() * scaler.get_scale()).backward()
    scaler.unscale_(optimizer)
    assert model.weight.grad.tolist() == [[1.0, 1.0]]
    scaler.step(optimizer)
    scaler.update()
    assert GradScaler("cpu", enabled=False).get_scale() == 1.0
