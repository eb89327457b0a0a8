"""A model in stages trains as it does on one rank that takes the micro-batches one by one, whatever the schedule."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from cases import runnable
from ranks import run
from turnout.models import GPT, GPTConfig, next_token_loss
from turnout.models.pipeline.engine import Pipeline
from turnout.models.pipeline.partition import PER_RANK, Stages
from turnout.moe import Balance, aux_loss, clip_grad_norm_

pytestmark = pytest.mark.sampled

LOSSES = {"balance": Balance(0.3, z_loss=0.1)}
DENSE = GPTConfig(vocab=24, dim=8, layers=5, heads=2, hidden=8, seq_len=6, moe_every=0)
SPARSE = replace(DENSE, moe_every=2, num_experts=4, moe=LOSSES)
CONFIGS = {
    "dense": DENSE,
    "moe": SPARSE,
    "hash": replace(SPARSE, moe={"gate": "hash"}),
    "sequence": replace(SPARSE, moe={**LOSSES, "balance": Balance(0.3, over="sequence", z_loss=0.1)}),
    "nine layers": replace(SPARSE, layers=9),
}
CLIP = 0.4  # below the norms met here
STEPS = 5


def batch(step: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(24, (size, 7), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


@cache
def one_rank(name: str, m: int) -> tuple[GPT, list[tuple[float, ...]]]:
    """The model after some steps, and (loss, balance losses, norm before clipping) of each step."""
    torch.manual_seed(0)
    model = GPT(CONFIGS[name]).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    for step in range(STEPS):
        task = aux = torch.zeros((), dtype=torch.float64)
        for tokens, targets in zip(*(part.chunk(m) for part in batch(step)), strict=True):
            loss = next_token_loss(model(tokens), targets) / m
            balance = aux_loss(model) / m
            (loss + balance).backward()
            task, aux = task + loss.detach(), aux + balance.detach()
        norm = clip_grad_norm_(model, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((float(task), float(aux), float(norm)))
    return model, seen


def in_stages(name: str, schedule: str, m: int) -> tuple[Pipeline, list[tuple[float, ...]]]:
    torch.manual_seed(0)
    stages = Stages.of(CONFIGS[name], schedule, dist.get_world_size())
    parts = [part.double() for part in stages.build(dist.get_rank())]
    pipeline = Pipeline(parts, stages, dist.group.WORLD, m)
    optimizer = torch.optim.AdamW(pipeline.parts.parameters(), lr=1e-2)
    forwards = []
    for part in parts:
        part.register_forward_hook(lambda *_: forwards.append(1))
    seen = []
    for step in range(STEPS):
        losses = pipeline.step(*batch(step))
        norm = pipeline.clip_grad_norm_(CLIP)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((float(losses.task), float(losses.aux), float(norm)))
        assert len(forwards) == (step + 1) * m * len(parts)  # none to find out shapes
    return pipeline, seen


def trained(name: str, schedule: str, m: int, oracle_m: int) -> None:
    one, expected = one_rank(name, oracle_m)
    assert all(norm > CLIP for _, _, norm in expected)
    pipeline, seen = in_stages(name, schedule, m)
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=1e-5, atol=1e-7)
    whole = dict(one.named_parameters())
    held = {n: p.detach() for part in pipeline.parts for n, p in part.named_parameters()}
    for n, p in held.items():
        torch.testing.assert_close(p, whole[n], rtol=1e-9, atol=1e-11, msg=lambda text, n=n: f"{n}: {text}")
    everyones = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, held)
    assert {n for names in everyones for n in names} == set(whole)
    embeddings = [names["embed.weight"] for names in everyones if "embed.weight" in names]
    assert len(embeddings) == (1 if schedule == "zbv" else 2)
    assert torch.equal(embeddings[0], embeddings[-1])
    ends = [part.embed.weight for part in pipeline.parts if part.embed is not None]
    assert all(torch.equal(p, ends[0]) for p in ends)

    one.eval()
    pipeline.parts.eval()
    tokens, targets = batch(99, size=7)  # not a multiple of the micro-batches
    torch.testing.assert_close(
        pipeline.evaluate(tokens, targets), next_token_loss(one(tokens), targets).detach(), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("name", ["dense", "moe"])
@pytest.mark.parametrize("schedule", runnable(PER_RANK))
def test_two_ranks_train_as_one(schedule, name):
    one_rank(name, 4)  # before the ranks fork
    run(2, trained, name, schedule, 4, 4)


@pytest.mark.parametrize(
    ("schedule", "m"), runnable([("gpipe", 2), ("1f1b", 4), *((s, 8) for s in list(PER_RANK)[2:])])
)
def test_four_ranks_train_as_one(schedule, m):
    name = "moe" if schedule in ("gpipe", "1f1b") else "nine layers"
    one_rank(name, m)
    run(4, trained, name, schedule, m, m)


def test_later_stages_get_the_token_ids():
    one_rank("hash", 2)
    run(2, trained, "hash", "1f1b", 2, 2)


def test_balance_within_sequences_does_not_depend_on_micro_batches():
    one_rank("sequence", 1)
    run(2, trained, "sequence", "1f1b", 4, 1)
