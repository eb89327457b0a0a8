"""The main job with masked tokens (BERT) and removed spans (T5): alike on one rank and two, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import objective
import options
import pytest
import sources
import steps
import torch
import torch.distributed as dist
import trained
from main_job import result, run
from ranks import run as on_ranks
from sources import Rows
from torch.utils.flop_counter import FlopCounterMode
from turnout.dispatch import Meshes
from turnout.models import BERT, T5, BERTConfig, T5Config, next_token_loss
from turnout.models.data import prepare
from turnout.models.pipeline.partition import model_of
from turnout.moe import GradScaler, aux_loss

SMALL = "--batch 8 --seq 32 --dim 16 --heads 2 --layers 2 --hidden 12 --experts 4 --eval-size 6 --steps 3 --warmup 1"
TEXT = torch.arange(900).mul(37).remainder(251).view(-1, 9).repeat(1, 4)[:, :33]  # later bytes repeat earlier ones


def job_of(flags: str, ranks: int = 1) -> options.Job:
    return options.parse([*SMALL.split(), *flags.split()]).fit(ranks)


class Some:
    """Batches as `turnout.models.data.Batches` reads them."""

    vocab, batch = 256, 8

    def __init__(self, rank: int = 0, ranks: int = 1, micro_batches: int = 1) -> None:
        self.mine = np.arange(8).reshape(micro_batches, ranks, -1)[:, rank].ravel()

    def __call__(self, step: int) -> torch.Tensor:
        return TEXT[8 * step + self.mine]


@pytest.mark.parametrize("kind", ["mlm", "denoise"])
def test_what_is_asked_of_a_row_does_not_depend_on_the_mesh(kind):
    job = job_of(f"--objective {kind}")
    whole = objective.Asked(job, Some())(2)
    parts = [objective.Asked(job, Some(rank, 2, 2))(2) for rank in range(2)]
    order = torch.from_numpy(np.concatenate([Some(rank, 2, 2).mine for rank in range(2)]))
    for one, *two in zip(*([*each.inputs, each.targets] for each in (whole, *parts)), strict=True):
        assert torch.equal(one[order], torch.cat(two))
    first, other = objective.Asked(job, Some())(0), objective.Asked(job_of(f"--objective {kind} --seed 1"), Some())(2)
    assert not torch.equal(whole.targets, first.targets)
    assert not torch.equal(whole.targets, other.targets)
    assert max(each.max() for each in whole.inputs) < job.config().vocab


def test_padding_for_ranks_that_split_sequences_changes_no_loss():
    job, found = job_of("--objective denoise --seq 28 --heads 4 --cp 2 --tp 2", 4), []
    model = model_of(job.config()).double()
    for each in (job, replace(job, cp=1, tp=1)):
        inputs, targets = objective.asked(each, TEXT[:, :29], objective.TRAIN, range(len(TEXT)))
        found.append(next_token_loss(model(*inputs), targets) + aux_loss(model))
        assert [x.shape[1] % 4 for x in inputs] == ([0, 0, 0, 0] if each.tp == 2 else [1, 2])
    assert torch.allclose(*found, rtol=1e-12)


def learned(flags: str) -> tuple[list[float], dict[str, float]]:
    job = job_of(f"--lr 2e-2 {flags}", dist.get_world_size())
    meshes = Meshes.of("cpu", pp=job.pp, cp=job.cp, tp=job.tp, ep=job.ep, etp=job.etp)
    model = steps.build(job, meshes, torch.float64)
    optimizer, dp = steps.optimizer_of(model, job), model.meshes.dense["dp"]
    mine = objective.Asked(job, Some(dp.get_local_rank(), dp.size(), job.micro_batches * job.accumulate))
    losses = [
        steps.train(model, optimizer, GradScaler("cpu", enabled=False), mine(step), job.lr_at(step)).loss
        for step in range(job.steps)
    ]
    loads, _ = steps.gather(model)
    assert len(loads) == (2 if "denoise" in flags else 1)
    assert all(sum(layer) > 0 for layer in loads)
    rows = TEXT[90:96][dp.get_local_rank() :: dp.size()]
    return losses, steps.held_out_figures(model, Rows(rows, 1.0), job)


@cache
def on_one(kind: str) -> tuple[list[float], dict[str, float]]:
    return on_ranks(1, learned, f"--objective {kind}")[0]


@pytest.mark.sampled
@pytest.mark.parametrize(
    "flags",
    [
        "--objective mlm --data-parallel zero2 --micro-batches 2",
        "--objective denoise --data-parallel fsdp",
        "--objective denoise --ep 1 --etp 2 --accumulate 2",
        "--objective mlm --data-parallel zero1 --ep 1 --recompute full",
        "--objective mlm --optimizer adamw --micro-batches 4",
        "--objective mlm --tp 2 --data-parallel zero1",
        "--objective denoise --tp 2 --micro-batches 2 --recompute selective",
        "--objective denoise --tp 2 --data-parallel fsdp --accumulate 2",
        "--objective denoise --pp 2 --schedule interleaved1f1b --accumulate 2",
        "--objective mlm --pp 2 --micro-batches 4 --data-parallel zero1",
        "--objective denoise --pp 2 --schedule zbv --recompute full",
        "--objective denoise --cp 2 --data-parallel zero1 --micro-batches 2",
        "--objective mlm --cp 2 --recompute full --accumulate 2",
        "--objective denoise --cp 2 --ep 1 --etp 2",
    ],
)
def test_losses_do_not_depend_on_the_mesh(flags):
    losses, figures = on_one(flags.split()[1])
    assert losses[-1] < losses[0]
    for again, evaluated in on_ranks(2, learned, flags):
        assert again == pytest.approx(losses, abs=1e-9)
        assert evaluated == pytest.approx(figures, abs=1e-9)


def test_accuracy_is_of_the_predicted_tokens_alone():
    class Copies(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return 50.0 * torch.nn.functional.one_hot(tokens, 264)

        def check_inputs(self, tokens: torch.Tensor) -> None:
            assert tokens.dtype == torch.int64

    def found() -> tuple[dict[str, float], float, float]:
        job = job_of("--objective mlm")
        model = steps.build(job, Meshes.of("cpu"))
        model.parts[0] = Copies()  # right where a predicted token stays as it is
        (inputs,), targets = objective.asked(job, TEXT[:6], objective.HELD_OUT, range(6))
        known = targets != -100
        same = float((inputs == targets)[known].double().mean())
        return steps.held_out_figures(model, Rows(TEXT[:6], 1.0), job), same, float(known.sum())

    ((figures, same, number),) = on_ranks(1, found)
    assert number == 6 * round(0.15 * 32)
    assert figures["accuracy"] == pytest.approx(same)
    assert figures["loss"] == pytest.approx(50 * (1 - same), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlm", pytest.param("denoise", marks=pytest.mark.thorough)])
def test_the_job_runs_reports_and_resumes(tmp_path, text, kind):
    flags = ("--objective", kind, "--steps", "4", "--save-every", "2", "--data", text, "--micro-batches", "2")
    whole = result(run(tmp_path, *flags, "--pp", "2", ranks=2))
    assert 0 < whole["val_loss"] < 8
    assert 0 <= whole["val_accuracy"] <= 1
    assert "val_bpb" not in whole
    page = (tmp_path / "report.html").read_text()
    assert "Nats per predicted token" in page
    assert "its per byte" not in page
    shutil.rmtree(tmp_path / "step-4")  # as if it had been stopped after step 2
    resumed = result(run(tmp_path, *flags, "--resume"))
    assert [resumed[key] for key in ("loss", "val_loss")] == pytest.approx([whole["loss"], whole["val_loss"]], rel=1e-4)
    assert resumed["val_accuracy"] == pytest.approx(whole["val_accuracy"], abs=0.03)
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all({"loss", "accuracy"} < event.keys() for event in events if event["event"] == "held out")
    with pytest.raises(ValueError, match=f"was trained by --objective {kind}: only a GPT"):  # generate.py, to_hf.py
        trained.newest(tmp_path, "cpu")


def test_ids_of_its_own_lie_behind_those_of_the_data(tmp_path):
    assert job_of("--objective mlm").config() == BERTConfig(
        **{f: getattr(job_of("").config(), f) for f in ("dim", "layers", "heads", "kv_heads", "hidden", "seq_len")},
        num_experts=4, moe=job_of("").config().moe, vocab=264, mask_token=256,
    )  # fmt: skip
    long = job_of("--objective denoise --seq 1024").config()
    assert (long.start, long.vocab) == (256, 320)  # 51 spans
    longer = job_of("--objective denoise --seq 2048 --vocab 300").config()
    assert (longer.start, longer.vocab) == (300, 448)  # 102 spans
    (tmp_path / "a.txt").write_text("some words " * 90)
    prepare(tmp_path / "data", [str(tmp_path / "a.txt")], "bpe:261")
    of_data = job_of(f"--objective mlm --data {tmp_path / 'data'}")
    config = sources.with_vocabulary(of_data).config()
    assert (config.mask_token, config.vocab) == (261, 264)
    with pytest.raises(ValueError, match=r"--vocab \(260\) must be at least 261"):
        sources.with_vocabulary(replace(of_data, vocab=260))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--objective mlm --pp 2 --schedule zbv",
            "--layers (2) must be at least 4: --schedule zbv cuts the model into 4",
        ),
        (
            "--objective denoise --pp 2 --layers 1 --moe-every 1 --schedule zbv",
            "--layers (1) must be at least 2: --sch",
        ),
        (
            "--objective denoise --cp 2 --cp-attention ring",
            "ring attention is causal and for a GPT alone; got T5Config",
        ),
        ("--objective mlm --cp 2 --heads 1 --eod 0", "cp=2 x tp=1 ranks; use a cp that divides heads / tp"),
        ("--objective mlm --mtp 1 --untied", "--mtp, --untied: only a GPT has that; leave it out with --objective mlm"),
        ("--objective denoise --seq 2", "--seq (2) must be at least 3 with --objective denoise"),
        ("--objective gpt", "--objective must be one of clm, mlm, denoise; got 'gpt'"),
        ("--objective mlm --moe-every 3", "--moe-every (3) must be at most --layers (2)"),
    ],
)
def test_what_does_not_fit_is_said(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        job_of(flags, 2)


@pytest.mark.parametrize("flag", ["--plan", "--elastic"])
def test_nothing_is_planned(tmp_path, text, flag):
    done = run(tmp_path, "--objective", "mlm", "--data", text, flag)
    assert done.returncode == 2
    assert "--objective mlm: the planner knows GPTs alone, so this job cannot be planned" in done.stderr


def test_flops_are_those_that_torch_counts():
    common = {"dim": 32, "heads": 2, "layers": 2, "hidden": 16, "moe_every": 0, "seq_len": 16}
    bert, t5 = BERT(BERTConfig(**common)), T5(T5Config(**common, decoder_layers=4))
    source, target = torch.zeros(3, 15, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64)
    for model, inputs, said in (
        (bert, (source,), 3 * 15 * bert.flops_per_token(15)),
        (t5, (source, target), 3 * t5.flops(15, 7)),
    ):
        with FlopCounterMode(display=False) as counter:
            model(*inputs).sum().backward()
        assert 0.9 < counter.get_total_flops() / said < 1.1
