"""`check` finds what raises no error by itself, on every rank, and nothing where all is well."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, tokens
from ranks import errors
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from turnout.dispatch import FlatDispatcher, LocalDispatcher, Meshes
from turnout.models import GPTConfig, parallel_model
from turnout.moe import MoE, check, expert_parameters, fully_shard_experts, parallelize, param_groups, sync_gradients


def build(**options) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (MoE(WIDTH, 12, EXPERTS, seed=seed, **options) for seed in range(2))
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *layers, nn.Linear(WIDTH, WIDTH))


def grid(edp: int = 2, names=("edp", "ep")):
    return init_device_mesh("cpu", (edp, 4 // edp), mesh_dim_names=names)


def adamw(model: nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model), **options)


def ignoring_experts(model: nn.Module) -> DDP:
    DDP._set_params_and_buffers_to_ignore_for_model(model, list(expert_parameters(model)))
    return DDP(model)


def step(model: nn.Module, mesh, optimizer, sync: bool = True) -> None:
    model(tokens(4, torch.float32) + dist.get_rank()).square().sum().backward()
    if sync:
        sync_gradients(model, mesh)
    optimizer.step()


def well(how):
    mesh = grid(1 if how == "edp of one" else 2)
    model = parallelize(build(gate="sigmoid" if how == "ddp" else "topk"), mesh)
    if how in ("fsdp", "edp of one"):
        fully_shard_experts(model, mesh)
        fully_shard(model)
    elif how == "ddp":
        model = ignoring_experts(model)
    elif how == "replicate":
        replicate(model, ignored_modules=[m.experts for m in model if isinstance(m, MoE)])
    optimizer = adamw(model, foreach=True)
    assert check(model, mesh, optimizer) is None
    if how == "plain":
        step(model, mesh, optimizer)
        model[1].gate.eval()
        experts = {id(p) for p in expert_parameters(model).values()}
        two = [torch.optim.AdamW([p for p in model.parameters() if (id(p) in experts) == own]) for own in (True, False)]
        check(model, mesh, two)


@pytest.mark.parametrize("how", ["plain", "fsdp", "edp of one", "ddp", "replicate"])
def test_nothing_is_found_where_all_is_well(how):
    assert errors(4, well, how) == [""] * 4


def whole_jobs(data):
    config = GPTConfig(vocab=16, dim=16, layers=2, heads=2, hidden=12, seq_len=8, num_experts=4)
    torch.manual_seed(0)
    model = parallel_model(config, meshes := Meshes.of("cpu", tp=2, ep=2), data=data)
    check(model, meshes, adamw(model))


@pytest.mark.parametrize("data", ["replicate", "zero1", "fsdp"])
def test_nothing_is_found_in_a_whole_job(data):
    assert errors(4, whole_jobs, data) == [""] * 4


def mistake(what):
    mesh, model = grid(), build()
    if what == "early":
        optimizer = torch.optim.AdamW(model.parameters())
        return check(parallelize(model, mesh), mesh, optimizer)
    if what == "not parallelized":
        parallelize(model[1], mesh)
        return check(model, mesh, adamw(model))
    parallelize(model, mesh)
    if what == "mixed":
        return check(model, mesh, torch.optim.AdamW(model.parameters(), foreach=True))
    if what == "left out":
        return check(model, mesh, adamw(model[1:]))
    if what == "other mesh":
        return check(model, mesh["ep"], adamw(model))
    if what == "no dispatcher":
        model[1].dispatcher = LocalDispatcher()
    elif what == "dispatcher":
        model[1].dispatcher = FlatDispatcher(mesh["edp"].get_group())
    elif what == "assigned":
        model[2].experts.w_up = nn.Parameter(torch.zeros(EXPERTS, WIDTH, 12))
    elif what == "replicate":
        replicate(model)
    elif what == "fully_shard":
        for layer in model[1:3]:
            fully_shard(layer.experts, mesh=mesh["edp"])
        fully_shard(model)
    elif what == "dense over edp":
        fully_shard_experts(model, mesh)
        fully_shard(model, mesh=mesh["edp"])
    elif what == "drift":
        step(model, mesh, adamw(model), sync=False)
    elif what == "one rank" and dist.get_rank() == 2:
        model[1].balance = 0.5
        model[2].dispatcher = LocalDispatcher()
    check(model, mesh, adamw(model))
    return None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("early", "6 parameters that the model lacks"),
        ("early", "the optimizer lacks 1.experts.w_up, 1.experts.w_down, 1.experts.w_gate, 2.experts.w_up"),
        ("not parallelized", "layer 2 is on one rank: call parallelize(model, mesh) on the whole model"),
        ("mixed", "group 0 of AdamW(foreach=True) mixes plain tensors and DTensors"),
        ("left out", "the optimizer lacks 0.weight, 0.bias"),
        ("other mesh", "layer 1 was parallelized over ranks [0, 1, 2, 3], but the mesh has [0, 1]"),
        ("no dispatcher", "the dispatcher of layer 1, LocalDispatcher, exchanges with ranks [] in groups of []"),
        ("dispatcher", "the dispatcher of layer 1, FlatDispatcher, exchanges with ranks [0, 2] in groups of [2]"),
        ("assigned", "w_up in the experts of layer 2 is a plain tensor"),
        ("replicate", "replicate averages 1.experts.w_up, 1.experts.w_down"),
        ("fully_shard", "FSDP2 divides the gradients of 1.experts.w_up, 1.experts.w_down, 1.experts.w_gate by 2"),
        ("dense over edp", "FSDP2 averages the gradients of 0.weight, 0.bias, 1.gate.weight, 2.gate.weight, 3.weight"),
        ("drift", "ranks differ: the values of parameter 0.weight on ranks 1, 2, 3 differ from rank 0"),
        ("one rank", "rank 2: the dispatcher of layer 2, LocalDispatcher"),
        (
            "one rank",
            "balance of layer 1 is Balance(weight=0.01, over='local', choices=None, z_loss=0.0) on ranks 0, 1, 3",
        ),
    ],
)
def test_mistakes_that_raise_no_error_by_themselves(what, message):
    found = errors(4, mistake, what)
    assert found[0].startswith("ValueError: ")
    assert message in found[0]
    assert all(message in error for error in found) or what in ("dispatcher", "other mesh")
    assert all(error.startswith("ValueError") for error in found)


def alone():
    """Without other ranks there is nothing to compare, and as much to find."""
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("ep",))
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    check(parallelize(build(), mesh), mesh, optimizer)


def test_one_rank():
    (error,) = errors(1, alone)
    assert "parameters that the model lacks" in error
