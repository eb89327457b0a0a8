"""A model in stages trains as it does on one rank that takes the micro-batches one by one, whatever the schedule."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import errors, run
from turnout.models import GPT, GPTConfig
from turnout.models.pipeline import Pipeline, cross_entropy
from turnout.models.stages import PER_RANK, Stages, cut, flops
from turnout.moe import aux_loss, clip_grad_norm_

DENSE = GPTConfig(vocab=24, dim=8, layers=5, heads=2, hidden=8, seq_len=6, moe_every=0)
SPARSE = replace(DENSE, moe_every=2, num_experts=4, moe={"aux_loss_weight": 0.3, "z_loss_weight": 0.1, "seed": 3})
CLIP = 0.4  # below the norms met here
STEPS = 5


def batch(step: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(24, (size, 7), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def one_rank(config: GPTConfig, m: int) -> tuple[GPT, list[tuple[float, ...]]]:
    """The model after some steps, and (loss, balance losses, norm before clipping) of each step."""
    torch.manual_seed(0)
    model = GPT(config).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    for step in range(STEPS):
        task = aux = torch.zeros((), dtype=torch.float64)
        for tokens, targets in zip(*(part.chunk(m) for part in batch(step)), strict=True):
            loss = cross_entropy(model(tokens), targets) / m
            balance = aux_loss(model) / m
            (loss + balance).backward()
            task, aux = task + loss.detach(), aux + balance.detach()
        norm = clip_grad_norm_(model, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((float(task), float(aux), float(norm)))
    return model, seen


def in_stages(config: GPTConfig, schedule: str, m: int, per_rank: int | None) -> tuple[Pipeline, list]:
    group = dist.group.WORLD
    torch.manual_seed(0)
    stages = Stages.of(config, schedule, dist.get_world_size(), per_rank)
    parts = [part.double() for part in stages.build(dist.get_rank())]
    pipeline = Pipeline(parts, stages, group, m)
    optimizer = torch.optim.AdamW(pipeline.parts.parameters(), lr=1e-2)
    seen = []
    for step in range(STEPS):
        losses = pipeline.step(*batch(step))
        norm = pipeline.clip_grad_norm_(CLIP)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((float(losses.task), float(losses.aux), float(norm)))
    return pipeline, seen


def trained(config: GPTConfig, schedule: str, m: int, per_rank: int | None = None) -> None:
    one, expected = one_rank(config, m)
    assert all(norm > CLIP for _, _, norm in expected)
    pipeline, seen = in_stages(config, schedule, m, per_rank)
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=1e-10, atol=1e-12)
    whole = dict(one.named_parameters())
    held = [name for part in pipeline.parts for name, _ in part.named_parameters()]
    for part in pipeline.parts:
        for name, p in part.named_parameters():
            torch.testing.assert_close(p, whole[name], rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, held)
    names = [name for names in everyones for name in names]
    assert set(names) == set(whole)
    assert len(names) == len(whole) + (len(pipeline.stages.blocks) > 1)  # the embedding lies at both ends

    one.eval()
    pipeline.parts.eval()
    tokens, targets = batch(99, size=7)  # not a multiple of anything
    torch.testing.assert_close(
        pipeline.evaluate(tokens, targets), cross_entropy(one(tokens), targets).detach(), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "moe"])
@pytest.mark.parametrize("schedule", PER_RANK)
def test_two_ranks_train_as_one(schedule, config):
    run(2, trained, config, schedule, 4)
