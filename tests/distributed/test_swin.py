"""Swin with its experts on four ranks: outputs, gradients and saved states of one rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from cases import close, whole
from ranks import run
from torch.distributed.device_mesh import init_device_mesh
from turnout.models import Swin, SwinConfig, checkpoint
from turnout.moe import Balance, Capacity, aux_loss, parallelize, param_groups, sync_gradients

CONFIG = SwinConfig(
    channels=1, patch=2, dim=8, depths=(1, 2), heads=(1, 2), window=2, classes=3, num_experts=8, moe_stages=1
)


def build(config: SwinConfig) -> Swin:
    torch.manual_seed(0)
    model = Swin(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def on_many(capacity, folder):
    """Each rank has its own images. With a capacity, which is of a rank's own tokens, one rank takes them in turn."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    config = replace(CONFIG, capacity=capacity, moe={"balance": Balance(0.0 if capacity else 0.1, over="global")})
    images = torch.randn(2 * ranks, 1, 16, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one, model = build(config), build(config)
    parts = images.chunk(ranks) if capacity else [images]
    expected = []
    for part in parts:
        expected.append(one(part))
        ((expected[-1].square().sum() / ranks) + aux_loss(one) / len(parts)).backward()
    expected = torch.cat(expected)

    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))
    parallelize(model, mesh)
    y = model(images.chunk(ranks)[rank])
    (y.square().sum() + aux_loss(model)).backward()
    sync_gradients(model, mesh)
    close(y, expected.detach().chunk(ranks)[rank], 1e-11, "logits")
    for (name, p), q in zip(model.named_parameters(), one.parameters(), strict=True):
        assert q.grad is not None, name
        close(whole(p.grad), q.grad, 1e-9, name)

    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    checkpoint.save(folder, model, optimizer, step=1)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    checkpoint.load_newest(folder, model, optimizer)
    close(model.eval()(images.chunk(ranks)[rank]), one.eval()(images.chunk(ranks)[rank]).detach(), 1e-11, "loaded")


@pytest.mark.parametrize("capacity", [None, Capacity(1.25, eval_factor=2.0, drop="priority")])
def test_four_ranks_are_as_one(capacity, tmp_path):
    run(4, on_many, capacity, str(tmp_path))
