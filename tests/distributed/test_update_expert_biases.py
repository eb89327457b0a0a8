"""Biases of sigmoid gates over data and tensor ranks, and over a pipeline's micro-batches: those of one rank."""

from dataclasses import replace

import torch
import torch.distributed as dist
from cases import close, whole
from ranks import run
from turnout.dispatch import Meshes
from turnout.models import GPT, GPTConfig, next_token_loss, tensor_parallel
from turnout.models.pipeline.engine import Pipeline
from turnout.models.pipeline.partition import Stages
from turnout.moe import Balance, aux_loss, parallelize, sync_gradients, update_expert_biases

MOE = {"gate": "sigmoid", "free": ["identity", "constant"], "balance": Balance(over="global", z_loss=1e-2)}
CONFIG = GPTConfig(vocab=16, dim=16, layers=1, heads=2, hidden=12, seq_len=8, moe_every=1, num_experts=4, moe=MOE)
STEPS, MICRO = 2, 2


def build(config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(0)
    return quick(GPT(config).double())


def quick(model):
    """With biases that change the choice within a few steps."""
    for module in model.modules():
        if hasattr(module, "rate"):
            module.rate = 0.02
    return model


def batch(step: int) -> torch.Tensor:
    return torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(step))


def train(model, share=lambda tokens: tokens, sync=lambda: None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: update_expert_biases(model))
    for step in range(STEPS):
        for tokens in share(batch(step)).chunk(MICRO):
            ((next_token_loss(model(tokens[:, :-1]), tokens[:, 1:]) + aux_loss(model)) / MICRO).backward()
        sync()
        optimizer.step()
        optimizer.zero_grad()


def of(model) -> dict[str, torch.Tensor]:
    return {name: b for name, b in model.named_buffers() if name.endswith("gate.expert_bias")}


def over_a_mesh():
    one, model = build(), build()
    meshes = Meshes.of("cpu", tp=2, ep=2)
    parallelize(tensor_parallel(model, meshes.dense["tp"]), meshes)
    dp = meshes.dense["dp"]

    def share(tokens):  # of each micro-batch, as one rank has them
        return torch.cat([micro.chunk(dp.size())[dp.get_local_rank()] for micro in tokens.chunk(MICRO)])

    train(one)
    train(model, share, lambda: sync_gradients(model, meshes))
    for (name, mine), wanted in zip(of(model).items(), of(one).values(), strict=True):
        assert wanted.any(), name
        assert torch.equal(mine, wanted), name
    for (name, p), q in zip(model.named_parameters(), one.named_parameters(), strict=True):
        close(whole(p), q[1].detach(), 1e-9, name)


def in_a_pipeline():
    config = replace(CONFIG, layers=2)
    one = build(config)
    train(one)
    torch.manual_seed(0)
    stages = Stages.of(config, "1f1b", dist.get_world_size())
    pipeline = Pipeline(
        [quick(part.double()) for part in stages.build(dist.get_rank())], stages, dist.group.WORLD, MICRO
    )
    optimizer = torch.optim.SGD(pipeline.parts.parameters(), lr=0.1)
    for step in range(STEPS):
        pipeline.step(batch(step)[:, :-1], batch(step)[:, 1:])
        optimizer.step()
        optimizer.zero_grad()
        update_expert_biases(pipeline.parts)
    return list(of(pipeline.parts).values()), list(of(one).values())


def test_biases_over_a_mesh_are_those_of_one_rank():
    run(4, over_a_mesh)


def test_biases_in_a_pipeline_are_those_of_one_rank():
    results = run(2, in_a_pipeline)
    held = [bias for mine, _ in results for bias in mine]
    assert len(held) == 2
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(held, results[0][1], strict=True))
    assert all(bias.any() for bias in held)
