"""A loss far above those before is told, with where to look; and ranks that drift apart end the job."""

from __future__ import annotations

import re
from pathlib import Path

import launch
import matplotlib.pyplot  # noqa: F401  forked ranks need not import it
import options
import pretrain
import pytest
import steps
import torch
import torch.distributed as dist
from main_job import TEXT, TINY
from ranks import run
from spikes import FEWEST, Spikes
from test_job import batch
from turnout.dispatch import Meshes
from turnout.moe import GradScaler, MoE, ReplicaError


def test_noise_and_a_falling_loss_are_no_spikes():
    torch.manual_seed(0)
    spikes = Spikes()
    falling = (2 + 3 * torch.exp(-torch.arange(400) / 60) + 0.05 * torch.randn(400)).tolist()
    assert not [loss for loss in falling if spikes.look(loss, loss, torch.nn.Module(), 1.0)]


def spike(mesh: str, worst: int) -> str:
    """What is told of a step whose gradient is large in one expert, and whose loss is on the rank `worst`."""
    job = options.parse([*TINY.split(), *mesh.split()]).fit(dist.get_world_size())
    model = steps.build(job, Meshes.of("cpu", pp=job.pp, tp=job.tp, ep=job.ep))
    optimizer, scaler, spikes = steps.optimizer_of(model, job), GradScaler("cpu", enabled=False), Spikes()
    ordinary = model.step

    def strange(*args):
        losses = ordinary(*args)
        ep = model.meshes.experts["ep"]
        for layer in (module for part in model.parts for module in part.modules() if isinstance(module, MoE)):
            layer.experts.w_down.grad.to_local()[-1] = 100.0 * (ep.get_local_rank() == ep.size() - 1)  # the last expert
        return losses._replace(task=losses.task + 4 * (dist.get_rank() == worst))

    for number in range(FEWEST + 1):
        if number == FEWEST:
            model.step = strange
        tokens = batch(job, number, model.meshes)
        step = steps.train(model, optimizer, scaler, tokens, 1e-5, spikes=spikes)
        assert (step.spike is None) == (number < FEWEST)
    return str(step.spike)


def test_a_spike_names_layer_and_ranks():
    said = run(2, spike, "", 1)
    assert said[0] == said[1]
    assert re.fullmatch(
        r"loss 7\.\d+ is a spike: the median was 5\.\d+. It is highest on rank 1 \(9\.\d+\). blocks.1.feed_forward."
        r"experts.w_down has the largest gradient, of norm 1.6e\+03, on rank 1",
        said[0],
    ), said[0]


def train(out: str, flags: str, at: int) -> str:
    """The job, in which a bit of the router's weight flips on the last rank before step `at` -> its error."""
    launch.RANK, launch.RANKS = dist.get_rank(), dist.get_world_size()
    ordinary, taken = steps.train, 0

    def flipping(model, *args, **further):
        nonlocal taken
        taken += 1
        step = ordinary(model, *args, **further)
        if taken == at and launch.RANK == launch.RANKS - 1:
            router = next(m for part in model.parts for m in part.modules() if isinstance(m, MoE)).gate
            next(router.parameters()).data.view(torch.int32)[0, 0] ^= 1
        return step

    steps.train = flipping
    job = options.parse([*TINY.split(), "--out", out, "--data", TEXT, *flags.split()])
    with pytest.raises(ReplicaError) as error:
        pretrain.train(job.fit(launch.RANKS), torch.device("cpu"), launch.Place())
    return f"{taken}: {error.value}"


@pytest.mark.parametrize(
    ("flags", "found"), [("--check-every 2", 4), ("--check-every 100 --save-every 5", 5), ("--check-every 100", 6)]
)
def test_a_bit_that_flips_in_one_replica_is_found_before_the_next_checkpoint(tmp_path, flags, found):
    said = run(3, train, str(tmp_path), f"--steps 6 --batch 6 --ep 1 --eval-size 6 {flags}", 3)
    assert len(set(said)) == 1
    assert said[0].startswith(f"{found}: rank 2 holds other values of blocks.1.feed_forward.gate.weight")
    assert not list(Path(tmp_path).glob("step-*"))
