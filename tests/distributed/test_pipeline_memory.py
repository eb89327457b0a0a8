"""What a step holds for its backward: no more than its schedule's order of actions says, and nothing afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import runnable
from pipeline import Saved
from ranks import run
from turnout.models import GPTConfig
from turnout.models.pipeline.engine import Pipeline
from turnout.models.pipeline.partition import Stages

CONFIG = GPTConfig(vocab=16, dim=16, layers=4, heads=2, hidden=16, seq_len=8, moe_every=1, num_experts=4)
MICRO = 6


def held(schedule: str) -> tuple[float, int]:
    """(most, in what one micro-batch leaves on this rank; bytes after the step)."""
    torch.manual_seed(0)
    stages = Stages.of(CONFIG, schedule, dist.get_world_size())
    pipeline = Pipeline(stages.build(dist.get_rank()), stages, dist.group.WORLD, MICRO)
    tokens, saved = torch.randint(16, (MICRO, 8)), Saved()
    with saved.watch():
        pipeline.step(tokens, tokens)
    return saved.most * MICRO / saved.taken, saved.now


@pytest.mark.parametrize("schedule", runnable(["1f1b", "interleaved_zb", "zbv"]))
def test_memory_is_that_of_the_schedule(schedule):
    for most, after in run(2, held, schedule):
        assert 0.9 < most < 2.3  # of six micro-batches, as many as ranks; stages are not quite equally large
        assert after == 0
