"""Experts in float8 on two ranks: spread, split inside, and under FSDP2 they compute what one rank computes."""

import torch
import torch.distributed as dist
from ranks import run
from reference import close
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from turnout.moe import Capacity, MoE, fully_shard_experts, parallelize, sync_gradients
from turnout.moe.experts.sharded import whole

D, H, E = 32, 48, 4
# A row's scale is its own, so spreading rows and experts changes nothing; a slice of a row has another scale.
MESHES = {("ep",): ((2,), 1e-5), ("ep", "etp"): ((1, 2), 0.15), ("edp", "ep"): ((2, 1), 1e-5)}


def build(**options):
    torch.manual_seed(0)
    layer = MoE(D, H, E, 2, bias=True, seed=0, balance=0, **options)
    layer.experts.precision = "fp8"
    return nn.Sequential(layer, nn.Softplus())  # FSDP2 wants no view


def on_two():
    x = torch.randn(24, D, generator=torch.Generator().manual_seed(1))
    for axes, (shape, limit) in MESHES.items():
        for sizes, options in (([13, 11], {}), ([24, 0], {"capacity": Capacity(float(E), pad=True)})):
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=axes)
            one, many = build(**options), parallelize(build(**options), mesh)
            if "edp" in axes:
                fully_shard_experts(many, mesh)
                fully_shard(many)
            mine = x.split(sizes)[dist.get_rank()]
            y, expected = many(mine), one(x)
            assert close(y, expected.split(sizes)[dist.get_rank()], limit), (axes, sizes)
            expected.square().sum().backward()
            y.square().sum().backward()
            if "edp" not in axes:
                sync_gradients(many, mesh)
            for name, p in one[0].experts.named_parameters():
                grad = whole(many[0].experts.get_parameter(name).grad)
                scale = (grad * p.grad).sum() / p.grad.square().sum()  # ranks add up or average
                assert 0.4 < scale < 1.1, (axes, name)
                assert close(grad, scale * p.grad, limit), (axes, name)


def test_ranks_compute_what_one_does():
    run(2, on_two)
