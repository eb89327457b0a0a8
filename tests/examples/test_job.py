"""Steps of the main job on meshes of many shapes: the losses are those of one rank."""

from functools import cache

import corpus
import options
import pytest
import steps
import torch
import torch.distributed as dist
from cases import runnable
from ranks import run
from turnout.dispatch import Meshes
from turnout.moe import GradScaler

pytestmark = [pytest.mark.slow, pytest.mark.sampled]
TINY = "--batch 8 --seq 8 --dim 16 --heads 4 --layers 4 --hidden 12 --experts 4 --eval-size 8 --steps 4 --lr 2e-2"
TEXT = torch.arange(2000).mul(37).remainder(251).add(torch.arange(2000) // 100).remainder(256).to(torch.uint8)
MESHES = [
    (2, "--tp 2"),
    (2, "--ep 1 --data-parallel zero1"),
    (2, "--ep 2 --micro-batches 2 --recompute full"),
    (2, "--pp 2 --micro-batches 4 --schedule gpipe"),
    (2, "--pp 2 --micro-batches 2 --schedule zbv"),
    (4, "--ep 2 --etp 2 --micro-batches 2"),
    (4, "--tp 2 --ep 2 --micro-batches 2 --data-parallel fsdp"),
    (4, "--pp 2 --tp 2 --ep 2 --micro-batches 4 --schedule interleaved1f1b"),
    (8, "--pp 2 --tp 2 --ep 2 --micro-batches 2 --schedule 1f1b --data-parallel zero2"),
]


def batch(job: options.Job, step: int, meshes: Meshes) -> torch.Tensor:
    dp = meshes.dense["dp"]
    mine = {"rank": dp.get_local_rank(), "ranks": dp.size(), "micro_batches": job.micro_batches * job.accumulate}
    return corpus.batch(TEXT, job.seed, step, job.batch, job.seq, **mine)


def held_out(job: options.Job, meshes: Meshes) -> torch.Tensor:
    dp = meshes.dense["dp"]
    return corpus.held_out(TEXT, job.eval_size, job.seq, dp.get_local_rank(), dp.size())


def train(flags: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[steps + 1]: the loss of each step over all ranks, and bits per held-out byte."""
    job = options.parse([*TINY.split(), "--warmup", "1", *flags.split()]).fit(dist.get_world_size())
    meshes = Meshes.of("cpu", pp=job.pp, tp=job.tp, ep=job.ep, etp=job.etp)
    model = steps.build(job, meshes, dtype)
    optimizer, scaler = steps.optimizer_of(model, job), GradScaler("cpu", enabled=job.fp16)
    seen = []
    for step in range(job.steps):
        loss = steps.train(model, optimizer, scaler, batch(job, step, meshes), job.lr_at(step)).loss
        seen.append(loss)
        if step % 2:
            loads, dropped = steps.gather(model)  # of two steps, with all their micro-batches
            assert (min(dropped) > 0) == (job.capacity_factor > 0)
            assert [sum(layer) for layer in loads] == [2 * job.batch * job.seq * job.top_k] * 2
    return torch.tensor([*seen, steps.evaluate(model, held_out(job, meshes), job)], dtype=torch.float64)


@cache
def one_rank(flags: str = "") -> torch.Tensor:
    return run(1, train, flags)[0]


@pytest.mark.parametrize(("ranks", "flags"), runnable(MESHES))
def test_losses_do_not_depend_on_the_mesh(ranks, flags):
    for seen in run(ranks, train, flags):
        torch.testing.assert_close(seen, one_rank(), rtol=0, atol=1e-9)
    assert (one_rank()[1:-1] < one_rank()[0] - 0.02).all()  # it learns


OTHER = "--optimizer muon --lr-schedule linear"


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, f"{OTHER} --pp 2 --micro-batches 2 --accumulate 2"),
        (2, f"{OTHER} --accumulate 2 --micro-batches 2 --data-parallel zero1"),
        (1, f"{OTHER} --accumulate 4 --recompute sqrt"),
    ],
)
def test_a_batch_in_parts_is_one_batch(ranks, flags):
    for seen in run(ranks, train, flags):
        torch.testing.assert_close(seen, one_rank(OTHER), rtol=0, atol=1e-9)


def balanced(gate: str) -> list[list[int]]:
    job = options.parse([*TINY.split(), "--forced-balance", "--gate", gate]).fit(dist.get_world_size())
    model = steps.build(job, Meshes.of("cpu", ep=job.ep))
    tokens = batch(job, 0, model.meshes)
    steps.train(model, steps.optimizer_of(model, job), GradScaler("cpu", enabled=False), tokens, 1e-3)
    return steps.gather(model)[0]


@pytest.mark.parametrize("gate", ["topk", "expert_choice"])
def test_forced_balance_gives_each_expert_as_many(gate):
    assert run(2, balanced, gate)[0] == [[8 * 8 * 2 // 4] * 4] * 2


@pytest.mark.parametrize("balance", ["global", "local"])
def test_other_balance_losses_are_of_a_micro_batch(balance):
    flags = f"--balance {balance} --aux-weight 1"
    assert (one_rank(f"{flags} --micro-batches 2") - one_rank(flags)).abs().max() > 1e-6
    many = run(2, train, f"{flags} --micro-batches 2")[0]
    same = (many - one_rank(f"{flags} --micro-batches 2")).abs().max() < 1e-9
    assert same == (balance == "global")  # a micro-batch has the same sequences on any mesh


@pytest.mark.parametrize("how", ["--bf16", "--fp16", "--bf16 --data-parallel fsdp"])
def test_half_precision_stays_near(how):
    flags = f"{how} --pp 2 --tp 2 --micro-batches 2"
    seen = run(4, train, flags, torch.float32)[0]
    error = (seen - one_rank()).abs().max()
    assert 1e-6 < error < 0.05


@pytest.mark.parametrize(
    "flags",
    ["--bf16 --ep 2 --data-parallel zero1", "--fp16 --pp 2 --micro-batches 2 --recompute full", "--data-parallel fsdp"],
)
def test_float8_stays_near(flags):
    seen = run(2, train, f"{flags} --fp8", torch.float32)[0]
    error = (seen - one_rank()).abs()
    assert 1e-4 < error[0] < 0.02, "the loss of the same weights"
    assert error.max() < 0.15


def test_capacity_drops():
    run(2, train, "--capacity-factor 0.5")
