"""The average of weights on many ranks: its formula, and that it is saved for any mesh."""

from __future__ import annotations

import pytest
import torch
from cases import close, whole
from ranks import run
from test_oracle import CASES, Case, micro_batches
from torch import nn
from turnout.models import EMA, ParallelModel, checkpoint
from turnout.moe import param_groups

DECAY, STEPS = 0.3, 4  # above the decays of the first three updates


def start(case: Case) -> tuple[ParallelModel, torch.optim.Optimizer, EMA]:
    model = case.build("sequence", layers=4)
    return model, torch.optim.AdamW(param_groups(model), lr=1e-2), EMA(model.parts, DECAY)


def parameters(model: ParallelModel) -> dict[str, torch.Tensor]:
    return {name: whole(p) for part in model.parts for name, p in part.named_parameters()}


def train(model: ParallelModel, optimizer: torch.optim.Optimizer, ema: EMA) -> list[dict[str, torch.Tensor]]:
    """Parameters after each step."""
    dp, seen = model.meshes.dense["dp"], [parameters(model)]
    for step in range(STEPS):
        mine = torch.cat([batch.chunk(dp.size())[dp.get_local_rank()] for batch in micro_batches(step)])
        model.step(mine[:, :-1], mine[:, 1:])
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        seen.append(parameters(model))
    return seen


def averages(case: Case, folder: str) -> dict[str, torch.Tensor]:
    model, optimizer, ema = start(case)
    seen = train(model, optimizer, ema)
    expected = seen[0]
    for count, now in enumerate(seen[1:]):
        decay = min(DECAY, (1 + count) / (10 + count))
        expected = {name: decay * expected[name] + (1 - decay) * p for name, p in now.items()}
    with ema.applied():
        for name, p in parameters(model).items():
            close(p, expected[name], 1e-12, name)
        assert (p - seen[-1][name]).abs().max() > 1e-4
    for name, p in parameters(model).items():
        assert torch.equal(p, seen[-1][name])
    checkpoint.save(folder, [*model.parts, ema], optimizer, STEPS)
    return {name: p.clone() for name, p in expected.items()}


def loaded(case: Case, folder: str) -> dict[str, torch.Tensor]:
    model, optimizer, ema = start(case)
    checkpoint.load_newest(folder, [*model.parts, ema], optimizer)
    assert int(ema.updates) == STEPS
    with ema.applied():
        return parameters(model)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("before", "after"), [("pp2 1f1b", "dp2 fsdp"), ("dp2 zero1", "tp2"), ("etp2", "ep2"), ("ep2 fsdp", "dp2")]
)
def test_averages_load_on_another_mesh(before, after, tmp_path):
    expected = {name: p for each in run(2, averages, CASES[before], str(tmp_path)) for name, p in each.items()}
    for found in run(2, loaded, CASES[after], str(tmp_path)):
        for name, p in found.items():
            close(p, expected[name], 1e-12, name)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_decays_out_of_range(decay):
    with pytest.raises(ValueError, match=r"decay must lie in \(0, 1\)"):
        EMA(nn.Linear(2, 2), decay)


@pytest.mark.parametrize("saved", [True, False])
def test_averages_on_one_side_alone_are_named(saved, tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    both = [[model], [model, EMA(model, 0.9)]]
    checkpoint.save(tmp_path, both[saved], optimizer, 1)
    said = "of a model with averages .EMA.. rank 0: it has averages of the weights; give an EMA here as well"
    if not saved:
        said = "of a model without averages .EMA.. rank 0: it has no averages of the weights; leave out the EMA here"
    with pytest.raises(checkpoint.CheckpointError, match=said):
        checkpoint.load(tmp_path / "step-1", both[not saved], optimizer)
