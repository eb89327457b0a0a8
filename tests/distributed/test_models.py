"""BERT and T5 on two ranks train as on one, and dropout under tensor parallelism drops what it must."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import close, whole
from ranks import run
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import Meshes
from turnout.models import GPT, OBJECTIVES, GPTConfig, tensor_parallel
from turnout.models.dropout import Dropout
from turnout.models.recompute import Core
from turnout.moe import Balance, aux_loss, clip_grad_norm_, parallelize, param_groups, sync_gradients

SIZES = {"dim": 16, "layers": 2, "heads": 2, "hidden": 12, "seq_len": 12, "num_experts": 4}


def steps(own, config, model, ranks: int, rank: int, sync) -> list[float]:
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    history = []
    for step in range(2):
        text = torch.randint(256, (4, 13), generator=torch.Generator().manual_seed(step))
        inputs, targets = own.batch(config, text, torch.Generator().manual_seed(step))
        inputs, targets = [x.chunk(ranks)[rank] for x in inputs], targets.chunk(ranks)[rank]
        loss = own.loss(model(*inputs), targets)
        (loss + aux_loss(model)).backward()
        sync()
        history += [loss.detach(), clip_grad_norm_(model, 0.5)]
        optimizer.step()
        optimizer.zero_grad()
    return history


def trained(kind, ep):
    own = OBJECTIVES[kind]
    config = own.config(**SIZES, moe={"balance": Balance(0.1, over="global")})

    def build():
        torch.manual_seed(0)
        return own.model(config).double()

    one, model = build(), build()
    expected = torch.stack(steps(own, config, one, 1, 0, lambda: None))
    mesh = init_device_mesh("cpu", (2 // ep, ep), mesh_dim_names=("edp", "ep"))
    parallelize(model, mesh)
    found = torch.stack(steps(own, config, model, 2, dist.get_rank(), lambda: sync_gradients(model, mesh)))
    dist.all_reduce(found)
    close(found / 2, expected, 1e-10, "losses and norms")
    for (name, p), q in zip(model.named_parameters(), one.parameters(), strict=True):
        close(whole(p), q.detach(), 1e-9, name)


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_two_ranks_train_as_one(kind, ep):
    run(2, trained, kind, ep)


def split(dropout: float, norm: str):
    """A GPT split over two ranks: its logits in training, and what its modules drop of ones."""
    config = GPTConfig(**{**SIZES, "vocab": 32, "dropout": dropout, "norm": norm})
    tokens = torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = GPT(config).double()
    expected = model(tokens).detach()
    meshes = Meshes.of("cpu", tp=2)
    parallelize(tensor_parallel(model, meshes.dense["tp"]), meshes)
    torch.manual_seed(7)
    logits = whole(model(tokens))
    after = torch.rand(4)  # both ranks go on with the same numbers
    modules = [m for m in model.modules() if isinstance(m, Dropout | Core)]
    ones = torch.ones(1, 1, 40, 40)
    dropped = [m(ones) if isinstance(m, Dropout) else m(ones, ones, ones) for m in modules]
    return logits, expected, after, dropped


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_without_dropout_a_split_model_is_the_same(norm):
    for logits, expected, _, _ in run(2, split, 0.0, norm):
        close(logits, expected, 1e-12)


def test_split_sequences_and_heads_are_dropped_apart():
    first, second = run(2, split, 0.4, "rms")
    assert torch.equal(first[0], second[0])  # one model
    assert not torch.allclose(first[0], first[1])  # of which something was dropped
    assert torch.equal(first[2], second[2])
    assert len(first[3]) == 5  # embedding; attention and residual of two blocks
    for a, b in zip(first[3], second[3], strict=True):
        assert (a != b).float().mean() > 0.3
