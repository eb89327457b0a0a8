"""float16 with loss scaling: what overflows on one rank is skipped on all, and the rest trains as in float32."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, tokens, whole
from ranks import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from turnout.moe import GradScaler, MoE, aux_loss, clip_grad_norm_, parallelize, param_groups, sync_gradients


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
        scaler.unscale_(optimizer)
        clip_grad_norm_(model, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
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


def test_gradients_in_float16_are_refused():
    model = nn.Linear(2, 1).half()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 2).half()).sum()).backward()
    with pytest.raises(ValueError, match="keep parameters in float32"):
        scaler.unscale_(optimizer)
