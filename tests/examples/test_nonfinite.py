"""NaN in one rank's gradient: it ends the job or is left out, and never becomes a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import launch
import matplotlib.pyplot  # noqa: F401  forked ranks need not import it
import options
import pretrain
import pytest
import steps
import torch
import torch.distributed as dist
from log import read
from main_job import TEXT, TINY
from ranks import run
from test_job import batch
from turnout.dispatch import Meshes
from turnout.models.checkpoint import CheckpointError
from turnout.moe import GradScaler

MESHES = ["", "--pp 2", "--tp 2", "--data-parallel fsdp"]


def spoiled(bad: set[int], rank: int):
    """`steps.build` of a model whose gradient is NaN in some steps, in one number of one rank, after all is summed."""
    build = steps.build

    def spoiling(*args):
        model, taken = build(*args), 0
        step = model.step

        def taking(*args):
            nonlocal taken
            taken += 1
            losses = step(*args)
            if taken in bad and dist.get_rank() == rank:
                p = next(p for p in reversed(list(model.parameters())) if p.grad is not None)
                held = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
                held.view(-1)[0] = math.nan
            return losses

        model.step = taking
        return model

    return spoiling


def train(out: str, flags: str, bad: set[int], rank: int = 1) -> str:
    """The job, with NaN in some steps of one rank -> its error, or ""."""
    launch.RANK, launch.RANKS = dist.get_rank(), dist.get_world_size()
    steps.build = spoiled(bad, rank)
    job = options.parse(
        [*TINY.split(), "--data", TEXT, "--steps", "6", "--save-every", "1", "--out", out, *flags.split()]
    )
    try:
        pretrain.train(job.fit(launch.RANKS), torch.device("cpu"), launch.Place())
    except steps.NonFiniteError as error:
        return str(error)
    return ""


def saved(out: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in out.glob("step-*"))


@pytest.mark.parametrize("mesh", MESHES)
def test_stop_saves_nothing_of_it(tmp_path, mesh):
    said = run(2, train, str(tmp_path), f"{mesh} --keep 9", {4})
    assert said[0] == said[1]
    assert said[0].startswith("step 4: the norm of the gradient is NaN or infinite on some rank. Nothing was saved")
    assert "--on-nonfinite skip" in said[0]
    assert saved(tmp_path) == [1, 2, 3]


@pytest.mark.sampled
@pytest.mark.parametrize("mesh", MESHES)
def test_skip_goes_on_and_counts(tmp_path, mesh):
    assert run(2, train, str(tmp_path), f"{mesh} --on-nonfinite skip --log-every 2", {2, 5}) == ["", ""]
    events = read(tmp_path / "log.jsonl")
    lines, held_out = ([event for event in events if event["event"] == kind] for kind in ("step", "held out"))
    assert [line["skipped"] for line in lines] == [1, 1, 2]
    assert [line["gradient_norm"] is None for line in lines] == [True, False, False]  # of steps 2, 4 and 6
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert all(math.isfinite(event["bits_per_byte"]) for event in held_out)


def test_skip_gives_up(tmp_path):
    flags = "--on-nonfinite skip --max-skipped 2"
    said = run(2, train, str(tmp_path), flags, {2, 4, 5}, 0)
    assert said[0].startswith(
        "step 5: the norm of the gradient is NaN or infinite on some rank, as in 2 steps in a row"
    )
    assert saved(tmp_path) == [2, 3, 4]


def weights(batches: list[int], bad: set[int]) -> list[torch.Tensor]:
    """After a step on each of the batches."""
    job = options.parse(TINY.split()).fit(1)
    model = spoiled(bad, 0)(job, Meshes.of("cpu"))
    optimizer, scaler = steps.optimizer_of(model, job), GradScaler("cpu", enabled=False)
    for number in batches:
        steps.train(model, optimizer, scaler, batch(job, number, model.meshes), 1e-2)
    return [p.detach().clone() for p in model.parameters()]


def test_a_skipped_step_leaves_weights_and_moments_alone():
    (skipped,), (without,) = run(1, weights, [0, 7, 1], {2}), run(1, weights, [0, 1], set())
    for a, b in zip(skipped, without, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def overflows(bad: set[int], scale: float) -> list[tuple[bool, bool, float]]:
    """Of each step with float16: whether it was left out, was an overflow, and the scale after it."""
    job = options.parse([*TINY.split(), "--fp16"]).fit(dist.get_world_size())
    model = spoiled(bad, 1)(job, Meshes.of("cpu"))
    optimizer, scaler, seen = steps.optimizer_of(model, job), GradScaler("cpu", init_scale=scale), []
    for number in range(3):
        step = steps.train(model, optimizer, scaler, batch(job, number, model.meshes), 1e-2)
        seen.append((bool(step.nonfinite), step.overflow, scaler.get_scale()))
    return seen


def test_an_overflow_of_float16_is_left_to_its_scale():
    seen = run(2, overflows, {2}, 8.0)
    assert seen == [[(False, False, 8.0), (True, True, 4.0), (False, False, 4.0)]] * 2
    seen = run(2, overflows, {2}, 1.0)  # a smaller scale does not help
    assert seen == [[(False, False, 1.0), (True, False, 0.5), (False, False, 0.5)]] * 2
    skips = steps.Skips("stop", 10)
    skips.add(1, steps.Step(1.0, math.inf, "the norm of the gradient", overflow=True))
    assert (skips.total, skips.in_a_row) == (1, 0)


def poisoned(out: str, where: str) -> str:
    """The job, with infinity in one number after its second step, in a moment of rank 1's alone -> its error."""
    launch.RANK, launch.RANKS = dist.get_rank(), dist.get_world_size()
    step, taken = steps.train, 0

    def poisoning(model, optimizer, *args, **further):
        nonlocal taken
        taken += 1
        result = step(model, optimizer, *args, **further)
        if taken == 2 and (where == "weight" or dist.get_rank() == 1):
            p = next(model.parameters())
            held = p if where == "weight" else optimizer.state[p]["exp_avg"]
            held.data.view(-1)[0] = math.inf
        return result

    steps.train = poisoning
    job = options.parse([*TINY.split(), "--data", TEXT, "--steps", "6", "--save-every", "1", "--out", out])
    with pytest.raises(CheckpointError) as caught:
        pretrain.train(job.fit(launch.RANKS), torch.device("cpu"), launch.Place())
    return str(caught.value)


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_what_is_not_finite_is_not_saved(tmp_path, where):
    (said,) = {*run(2, poisoned, str(tmp_path), where)}
    name = {"weight": "model.embed.weight", "moment": "optimizer.state.embed.weight.exp_avg"}[where]
    rank = {"weight": 0, "moment": 1}[where]
    assert said.startswith(f"rank {rank}: {name} and 0 other tensors have NaN or infinity and are not saved")
    assert saved(tmp_path) == [1]
