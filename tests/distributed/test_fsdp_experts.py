"""FSDP2 of experts whose tensors split unevenly, inside or nowhere."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, close, tokens, whole
from ranks import errors, run
from test_parallelize import tied
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from turnout.moe import MoE, aux_loss, fully_shard_experts, parallelize


def sharded(hidden):
    """FSDP2 of experts with biases, their hidden width split over etp, as one process."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("edp", "ep", "etp"))
    x = tokens(8)
    one, many = (nn.Sequential(MoE(WIDTH, hidden, EXPERTS, bias=True, seed=0), nn.Softplus()).double() for _ in "12")
    many[0].gate.load_state_dict(one[0].gate.state_dict())
    parallelize(many, mesh)
    fully_shard_experts(many, mesh)
    fully_shard(many)
    (one(x).square().sum() / len(x) + aux_loss(one) * 0).backward()
    mine = x.chunk(4)[dist.get_rank()]
    (many(mine).square().sum() * 4 / len(x) + aux_loss(many) * 0).backward()
    for name, p in one.named_parameters():
        close(whole(many.get_parameter(name).grad), p.grad, 1e-12, name)
    other = MoE(WIDTH, hidden, EXPERTS, bias=True, seed=1).double()
    many[0].experts.load_state_dict(other.experts.state_dict())
    for name, p in other.experts.named_parameters():
        assert torch.equal(whole(many[0].experts.get_parameter(name)), p), name
    many[0].experts.reset_parameters()
    for name, p in many[0].experts.named_parameters():
        fresh = MoE(WIDTH, hidden, EXPERTS, bias=True, seed=0).double().experts
        assert torch.equal(whole(p), fresh.get_parameter(name)), name


def splits_nowhere():
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("edp", "ep"))
    fully_shard_experts(parallelize(nn.Sequential(MoE(3, 5, 7, seed=0)), mesh), mesh)


def test_fsdp_of_sizes_that_split_nowhere_is_refused():
    for error in errors(2, splits_nowhere):
        assert error.startswith(
            "ValueError: the part of 0.experts.w_up on each rank, (7, 3, 5), does not split over edp=2 on any axis"
        )


@pytest.mark.parametrize("hidden", [12, 14, 2])
def test_fsdp_of_experts_split_inside_with_biases(hidden):
    run(4, sharded, hidden)


def shared():
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("edp", "ep"))
    fully_shard_experts(parallelize(tied("parameters").float(), mesh), mesh)


def test_fsdp_of_experts_that_share_parameters_is_refused():
    for error in errors(2, shared):
        assert error.startswith("ValueError: layer 0 and layer 1 share expert parameters, which FSDP2 would copy")
