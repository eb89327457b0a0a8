"""The planner in the main job: --plan, --elastic, and what it says of memory and traffic against what is counted."""

from functools import partial

import options
import planned
import pytest
import steps
import torch
import torch.distributed as dist
from main_job import result, run
from ranks import run as on_ranks
from test_traffic import counted
from turnout.dispatch import Meshes
from turnout.models import GPTConfig, parallel_model
from turnout.models.planner import Architecture
from turnout.models.planner.volume import traffic

SIZES = "--batch 8 --seq 32 --dim 64 --layers 4 --heads 4 --hidden 32 --experts 4 --eval-size 8 --aux-weight 0"


def test_plan_says_what_a_job_takes_and_starts_nothing(tmp_path):
    flags = "--batch 16 --eval-size 16 --plan --ranks 8 --tp 2 --ep 4 --steps 100000 --cluster h100"
    done = run(tmp_path, *flags.split())
    assert done.returncode == 0, done.stderr
    for words in (
        "| weights |",
        "| tp |",
        "| ep |",
        "| the step |",
        "100,000 steps",
        "8 ranks: pp 1, dp 4, tp 2; ep 4",
    ):
        assert words in done.stdout, words
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--plan --ranks 6 --tp 4", "must be a multiple of 4"),
        ("--ranks 8", "--ranks (8) is what --plan plans for"),
        ("--plan --cluster frontier", "no such preset"),
    ],
)
def test_plans_that_do_not_fit_are_refused(tmp_path, flags, words):
    done = run(tmp_path, *flags.split())
    assert done.returncode == 2
    assert words in done.stderr


def test_a_plan_takes_every_flag_of_the_model():
    flags = "--cp 2 --mtp 1 --windows 8,0 --untied --qk-norm --kv-heads 2 --optimizer muon --ema 0.99"
    job = options.parse([*SIZES.split(), *flags.split()]).fit(4)
    text = planned.plan(job, 4, train_tokens=10**9)
    for words in ("4 ranks: pp 1, dp 2, cp 2, tp 1", "| average |", "| cp |", "| cp traffic |"):
        assert words in text, words


def test_warnings_of_a_plan():
    job = options.parse(
        [*SIZES.split(), "--batch", "64", "--eval-size", "64", "--ep", "4", "--cluster", "h100", "--steps", "1000"]
    )
    text = planned.plan(job.fit(16), 16, train_tokens=4096)
    assert "the data is passed over 500 times, and the job refuses more than --epochs (4)" in text
    wide = options.parse(
        [*SIZES.split(), "--batch", "64", "--eval-size", "64", "--experts", "16", "--ep", "16", "--cluster", "h100"]
    )
    assert "ep x etp (16) leaves the node of 8 ranks" in planned.plan(wide.fit(16), 16, train_tokens=10**9)
    huge = options.parse([*SIZES.split(), "--dim", "8192", "--layers", "96", "--cluster", "h100"]).fit(8)
    assert "does not fit" in planned.plan(huge, 8, train_tokens=10**9)


FLAGS = [
    "--dense",
    "--dense --tp 2",
    "--dense --pp 2 --micro-batches 4",
    "--dense --data-parallel zero1",
    "--dense --data-parallel zero2 --micro-batches 2",
    "--dense --data-parallel fsdp --micro-batches 2",
    "--ep 2",
    "--tp 2 --ep 2",
    "--dense --tp 2 --recompute full",
    "--ep 2 --recompute full",
    "--dense --tp 2 --mtp 1 --windows 8,0 --qk-norm",
    "--dense --untied --pp 2 --micro-batches 4",
    "--dense --mtp 1 --pp 2 --micro-batches 4",
    "--dense --cp 2 --kv-heads 1",
    "--dense --cp 2 --cp-attention ring --recompute full",
    "--dense --cp 2 --data-parallel zero1",
]


def sent() -> list[tuple[dict[str, float], dict[str, float]]]:
    """For each of FLAGS, bytes by axis of a step of the job, counted on this rank, and as planned."""
    found = []
    for flags in FLAGS:
        job = options.parse([*SIZES.split(), *flags.split()]).fit(dist.get_world_size())
        meshes = Meshes.of("cpu", pp=job.pp, cp=job.cp, tp=job.tp, ep=job.ep, etp=job.etp)
        model = steps.build(job, meshes)
        tokens = torch.randint(256, (job.batch // meshes.dense["dp"].size(), job.seq + 1))
        model.step(tokens[:, :-1], tokens[:, 1:])
        model.zero_grad()
        seen: dict[str, float] = {}
        for key, size in counted(meshes, partial(model.step, tokens[:, :-1], tokens[:, 1:])).items():
            axis, kind = key.split()
            axis = axis.split("=")[0]
            if axis == "cp":  # keys and values, or gradients of both ranks
                axis = "cp" if kind == "all_to_all" else "dp"
            elif kind == "all_to_all":
                axis = "ep"
            seen[axis] = seen.get(axis, 0) + size
        layout = planned.layout_of(job, dist.get_world_size())
        found.append((seen, traffic(Architecture.of(job.config()), layout)))
    return found


def test_traffic_is_what_the_job_counts():
    ranks = on_ranks(2, sent)
    for number, flags in enumerate(FLAGS):
        for axis, size in ranks[0][number][1].items():
            seen = sum(rank[number][0].get(axis, 0.0) for rank in ranks) / 2
            # rows to experts by the router's choices; beside gradients, a byte for each parameter and norms over tp
            assert seen == pytest.approx(size, rel=0.25 if axis == "ep" else 0.02), (flags, axis)


def best_layout() -> tuple[tuple[int, ...], float]:
    torch.manual_seed(0)
    config = GPTConfig(layers=2, dim=32, hidden=32, seq_len=16)
    model = parallel_model(config, layout="auto", batch=8)
    sizes = tuple(model.meshes.dense[axis].size() for axis in ("pp", "dp", "tp"))
    tokens = torch.randint(256, (8 // sizes[1], 17))
    with pytest.raises(ValueError, match="takes batch="):
        parallel_model(config, layout="auto")
    with pytest.raises(ValueError, match="needs meshes"):
        parallel_model(config)
    return sizes, float(model.step(tokens[:, :-1], tokens[:, 1:]).task)


def test_a_model_in_the_layout_that_the_planner_finds():
    (first, loss), (second, _) = on_ranks(2, best_layout)
    assert first == second
    assert first[0] * first[1] * first[2] == 2
    assert 4 < loss < 7


@pytest.mark.thorough
@pytest.mark.slow
def test_elastic_takes_what_fits_the_ranks_that_are_left(tmp_path):
    """Four ranks, then three, which the flags do not fit: another layout, and the same run goes on."""
    flags = [
        "--elastic",
        "--batch",
        "12",
        "--eval-size",
        "12",
        "--layers",
        "4",
        "--save-every",
        "2",
        "--log-every",
        "1",
    ]
    first = result(run(tmp_path, *flags, "--steps", "2", ranks=4))
    second = result(run(tmp_path, *flags, "--steps", "4", "--resume", ranks=3))
    assert (first["ranks"], second["ranks"]) == (4, 3)
    assert second["parameters"] == first["parameters"]
    assert second["mesh"] != first["mesh"]
