"""Copies of a model on many ranks: they train like it, over the same groups, and share no weights."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
from cases import build, tokens, whole
from ranks import run
from torch.distributed.device_mesh import init_device_mesh
from torch.optim.swa_utils import AveragedModel
from turnout.dispatch import Meshes, Profile
from turnout.dispatch.autoselect.profile import Flop, Link
from turnout.models import GPT, GPTConfig, parallel_model
from turnout.models.data_parallel import computed_in
from turnout.moe import aux_loss, parallelize, sync_gradients
from turnout.moe.experts.sharded import local

BY_NODE, SLICED = {"node": 2, "local": 1}, {"edp": 1, "ep": 1, "etp": 2}
PROFILE = Profile(2, 1, Link(0.0, 0.0, 0.0), Link(0.0, 0.0, 1.0), Flop(1.0))
CASES = [
    (BY_NODE, {"dispatcher": "flat"}),
    (BY_NODE, {"dispatcher": "2dh", "wire": "bf16"}),
    (BY_NODE, {"dispatcher": "node", "overlap": 2}),
    (BY_NODE, {"dispatcher": "auto", "profile": PROFILE}),
    (SLICED, {}),
    ({"edp": 2}, {}),
]


def gradients(model, mesh) -> list[torch.Tensor]:
    x = tokens(9).split([6, 3])[dist.get_rank()]
    (model(x).square().mean() + aux_loss(model)).backward()
    sync_gradients(model, mesh)
    return [whole(p.grad) for p in model.parameters()]


def copied() -> None:
    for axes, options in CASES:
        mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
        model = build()[:3]
        parallelize(model, mesh, **options)
        wanted = gradients(model, mesh)  # now it has losses, with their graphs
        other = copy.deepcopy(model)
        assert other[1].dispatcher is model[1].dispatcher
        assert other[1].balance_group is model[1].balance_group is not None
        other.zero_grad()
        for got, want in zip(gradients(other, mesh), wanted, strict=True):
            assert torch.equal(got, want)
        with pytest.raises(TypeError, match=r"save model\.state_dict\(\)"):
            torch.save(model, io.BytesIO())


def averaged() -> None:
    model = parallelize(build(), init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)))
    model(tokens(3))
    mean = AveragedModel(model)
    mean.update_parameters(model)
    before = [whole(p) for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    mean.update_parameters(model)
    for p, was in zip(mean.module.parameters(), before, strict=True):
        torch.testing.assert_close(whole(p), was + 0.5)


def copied_in_a_pipeline() -> list[float]:
    config = GPTConfig(vocab=16, dim=16, layers=2, heads=2, hidden=12, seq_len=8, num_experts=4)
    torch.manual_seed(0)
    model = parallel_model(config, Meshes.of("cpu", pp=2), micro_batches=2)
    batch = torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(0))
    x, y = batch[:, :-1], batch[:, 1:]
    wanted = model.step(x, y)
    other = copy.deepcopy(model)
    assert other.meshes is model.meshes
    assert other.pipeline.parts[0] is other.parts[0] is not model.parts[0]
    other.zero_grad()
    assert other.step(x, y) == wanted
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(p.grad), whole(q.grad))
        assert local(p).data_ptr() != local(q).data_ptr()
    return [float(wanted.task)]


def test_copies_train_alike():
    run(2, copied)


def test_weights_are_averaged():
    run(2, averaged)


def test_a_copy_of_a_pipeline_runs_its_own_stages():
    run(2, copied_in_a_pipeline)


def test_a_copy_under_autocast_has_its_own_weights():
    model = computed_in(
        torch.bfloat16, GPT(GPTConfig(vocab=16, dim=16, layers=1, heads=2, hidden=12, seq_len=8)), "cpu"
    )
    tokens = torch.arange(8).unsqueeze(0)
    y, other = model(tokens), copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(other(tokens), y)
    assert not torch.equal(model(tokens), y)
