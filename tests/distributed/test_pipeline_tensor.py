"""A pipeline of stages whose layers, sequences and experts are split over tensor-parallel ranks."""

import pytest
import torch
from cases import runnable
from ranks import errors, run
from torch.distributed.tensor import DTensor
from turnout.dispatch.mesh import Meshes
from turnout.models import GPT, Boundary, GPTConfig, Pipeline, Stages, next_token_loss, tensor_parallel
from turnout.moe import Balance, aux_loss, clip_grad_norm_, parallelize, sync_gradients
from turnout.moe.layer import moe_layers

LOSSES = {"balance": Balance(0.3, over="global")}
CONFIG = GPTConfig(vocab=24, dim=8, layers=4, heads=2, hidden=8, seq_len=6, num_experts=4, moe=LOSSES)


def stepped(schedule, parallelism):
    meshes = Meshes.of("cpu", pp=2, tp=2, ep=2)
    group = meshes.dense.get_group("pp")
    torch.manual_seed(0)
    stages = Stages.of(CONFIG, schedule, 2)
    parts = [part.double() for part in stages.build(meshes.dense.get_local_rank("pp"))]
    for part in parts:
        tensor_parallel(part, meshes.dense["tp"])
        parallelize(part, meshes, parallelism=parallelism)
        for layer in moe_layers(part).values() if parallelism == 1 else ():
            layer.shadow = [0, 3]
    pipeline = Pipeline(parts, stages, group, 4, next_token_loss, Boundary(8, meshes.dense.get_group("tp")))
    tokens = torch.randint(24, (8, 7), generator=torch.Generator().manual_seed(0))
    tokens, targets = tokens[:, :-1], tokens[:, 1:]
    losses = pipeline.step(tokens, targets)
    for part in parts:
        sync_gradients(part, meshes)
    norm = pipeline.clip_grad_norm_(0.1)

    torch.manual_seed(0)
    one, task, aux = GPT(CONFIG).double(), 0.0, 0.0
    for x, y in zip(tokens.chunk(4), targets.chunk(4), strict=True):
        loss, balance = next_token_loss(one(x), y) / 4, aux_loss(one) / 4
        (loss + balance).backward()
        task, aux = task + float(loss.detach()), aux + float(balance.detach())
    assert (float(losses.task), float(losses.aux)) == pytest.approx((task, aux), rel=1e-9)
    assert float(norm) == pytest.approx(float(clip_grad_norm_(one, 0.1)), rel=1e-9)
    expected = {name: p.grad for name, p in one.named_parameters()}
    for part in parts:
        for name, p in part.named_parameters():
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12, msg=lambda t, n=name: f"{n}: {t}")
    one.eval()
    pipeline.parts.eval()
    assert float(pipeline.evaluate(tokens, targets)) == pytest.approx(
        float(next_token_loss(one(tokens), targets).detach())
    )


@pytest.mark.parametrize(
    ("schedule", "parallelism"), runnable([("1f1b", None), ("zbv", None), ("1f1b", 0), ("1f1b", 1)])
)
def test_a_step_is_that_of_one_rank(schedule, parallelism):
    run(4, stepped, schedule, parallelism)


def gathered_in_halves(schedule):
    meshes = Meshes.of("cpu", pp=2, ep=2)
    torch.manual_seed(0)
    stages = Stages.of(CONFIG, schedule, 2)
    parts = [parallelize(part, meshes) for part in stages.build(meshes.dense.get_local_rank("pp"))]
    if meshes.dense.get_local_rank("pp"):  # the other stages' ranks must hear of it
        next(iter(moe_layers(parts[0]).values())).parallelism = 0
    tokens = torch.zeros(4, 6, dtype=torch.int64)
    Pipeline(parts, stages, meshes.dense.get_group("pp"), 4).step(tokens, tokens)


@pytest.mark.parametrize("schedule", runnable(["zbv"]))
def test_a_backward_in_halves_refuses_experts_that_are_gathered(schedule):
    for error in errors(4, gathered_in_halves, schedule):
        assert error.startswith(f"ValueError: schedule {schedule!r} takes the backward in halves")
