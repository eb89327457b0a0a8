"""One bit that differs on one rank of those that keep the same weight is found, and nothing else is."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import errors, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from turnout.dispatch import Meshes
from turnout.models import GPTConfig, parallel_model
from turnout.moe import Gate, MoE, ReplicaError, check_replicas, parallelize
from turnout.moe.experts.sharded import local


def flip(tensor: torch.Tensor, at: int = -1, bit: int = 0) -> None:
    """One bit of what lies here."""
    words = local(tensor.detach()).view(-1).view(torch.int32)
    words[at] ^= 1 << bit


def layer(mesh) -> MoE:
    torch.manual_seed(0)
    moe = MoE(8, 16, 4, gate="sigmoid")
    parallelize(moe, mesh)
    return moe


def flipped(name: str, rank: int, axes: tuple[int, ...]) -> None:
    moe = layer(init_device_mesh("cpu", axes, mesh_dim_names=("edp", "ep")[-len(axes) :]))
    check_replicas(moe)
    if dist.get_rank() == rank:
        flip(dict([*moe.named_parameters(), *moe.named_buffers()])[name], bit=rank)
    check_replicas(moe)


@pytest.mark.parametrize("name", ["gate.weight", "gate.expert_bias"])
def test_a_router_is_held_by_all(name):
    (said,) = set(errors(4, flipped, name, 2, (2, 2)))
    assert said.startswith(
        f"ReplicaError: rank 2 holds other values of {name} than ranks 0, 1, 3. Go back to the newest"
    )


@pytest.mark.parametrize("rank", [0, 3])
def test_a_repeated_expert_is_held_by_two_of_which_either_may_be_wrong(rank):
    (said,) = set(errors(4, flipped, "experts.w_down", rank, (2, 2)))
    pair, part = {0: ("rank 0 and rank 2", "0:2, 0:16, 0:8"), 3: ("rank 1 and rank 3", "2:4, 0:16, 0:8")}[rank]
    assert said.startswith(f"ReplicaError: {pair} hold different values of experts.w_down[{part}]. Go back")


def test_what_one_rank_keeps_is_compared_with_nothing():
    assert errors(2, flipped, "experts.w_down", 1, (2,)) == ["", ""]
    assert check_replicas(MoE(8, 16, 4)) is None  # no process group


def sharded(rank: int) -> None:
    """Replicas of shards: FSDP2 over two, twice."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    fully_shard(model, mesh=mesh)
    check_replicas(model)
    if dist.get_rank() == rank:
        flip(model[0].weight)
        flip(model[1].bias, at=0)
    check_replicas(model)


def test_shards_have_replicas():
    (said,) = set(errors(4, sharded, 1))
    assert said.startswith(
        "ReplicaError: rank 1 and rank 3 hold different values of 0.weight[4:8, 0:8], and of 1 more."
    )


MESHES = [
    (4, {"pp": 2, "ep": 2}, {"micro_batches": 2}),
    (4, {"tp": 2, "ep": 2}, {"data": "fsdp"}),
    (4, {"ep": 2, "etp": 2}, {"data": "zero2"}),
    (8, {"pp": 2, "tp": 2, "ep": 2, "etp": 2}, {"micro_batches": 2, "data": "zero1", "bf16": True}),
]


def trained(axes: dict, how: dict, rank: int) -> None:
    """Replicas agree after some steps of training; after a bit flips in what two of them keep, they do not."""
    meshes = Meshes.of("cpu", **axes)
    torch.manual_seed(0)
    config = GPTConfig(
        vocab=32, dim=16, layers=4, heads=2, hidden=16, seq_len=8, num_experts=4, moe={"gate": "sigmoid"}
    )
    model = parallel_model(config, meshes, **how)
    optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()], lr=1e-2)
    for step in range(3):
        tokens = torch.randint(32, (4, 9), generator=torch.Generator().manual_seed(step))
        model.step(tokens[:, :-1], tokens[:, 1:])
        model.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        check_replicas(model.parts)
    if "data" in how:
        return  # shards without replicas
    router = next(module for module in model.parts[0].modules() if isinstance(module, Gate))
    if dist.get_rank() == rank:
        flip(next(router.parameters()))
    with pytest.raises(ReplicaError, match=r"and rank|other values of blocks"):
        check_replicas(model.parts)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "axes", "how"), MESHES)
def test_replicas_that_are_trained_stay_alike(ranks, axes, how):
    run(ranks, trained, axes, how, ranks - 1)
