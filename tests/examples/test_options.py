"""The main job's flags, files of them, and the scripts that start it on many nodes."""

import os
import re
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import options
import pytest
import torch
import torch.distributed as dist
from main_job import ROOT
from options import Job
from ranks import run
from torch.distributed.run import get_args_parser
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from turnout.dispatch import Meshes
from turnout.dispatch import mesh as axes
from turnout.models import GPT, Stages, tensor_parallel

CONFIGS = {"quick": 4, "laptop": 4, "one_node": 8, "cluster": 512}  # ranks
SCRIPTS = {"slurm": "cluster", "multi_node": "one_node"}


def of(name: str) -> Path:
    return ROOT / "examples" / "configs" / f"{name}.toml"


def test_every_file_is_tested():
    assert {path.stem for path in (ROOT / "examples" / "configs").iterdir()} == set(CONFIGS)
    assert {path.stem for path in (ROOT / "examples").glob("*.sh")} == set(SCRIPTS)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text('steps = 7\nmicro-batches = 4\nbf16 = true\nlr = 1\ndata = ["a", "b"]\ntensorboard = true\n')
    job = options.parse(["--config", str(file), "--steps", "9", "--no-bf16", "--tp", "2"])
    assert job == Job(steps=9, micro_batches=4, lr=1, data=("a", "b"), tensorboard=True, tp=2)
    assert options.parse([]) == Job()
    assert options.parse(["--data", "a", "b"]).data == ("a", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer = 3\nsteps = 1\nwidth = 2", "unknown layer, width; the keys are the flags, accumulate, "),
        ("steps = 1.5", "steps is int; got 1.5"),
        ("bf16 = 1", "bf16 is bool; got 1"),
        ('data = "text"', r"data is tuple; got 'text'"),
        ("steps =", "Invalid value"),
    ],
)
def test_files_that_are_wrong(tmp_path, text, message):
    file = tmp_path / "job.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        options.parse(["--config", str(file)])
    assert str(file) in str(error.value)


def test_no_file():
    with pytest.raises(ValueError, match=r"--config nowhere\.toml: .*No such file"):
        options.parse(["--config", "nowhere.toml"])


@pytest.mark.parametrize(
    ("flags", "ranks", "message"),
    [
        ("--pp 3", 4, r"the number of ranks (4) must be a multiple of 3 = pp x cp x tp"),
        ("--ep 3", 4, r"dp x cp x tp, the ranks of one of 1 stages, (4) must be a multiple of 3 = ep x etp"),
        ("--ep 8 --experts 4", 8, r"--experts (4) must be a multiple of 8 = ep"),
        ("--micro-batches 3", 1, r"--batch (32) must be a multiple of 3 = dp x micro-batches"),
        ("--eval-size 3", 2, r"--eval-size (3) must be a multiple of 2 = dp"),
        ("--schedule dualpipe", 1, "--schedule must be one of gpipe, 1f1b, interleaved1f1b"),
        ("--data-parallel ddp", 1, "--data-parallel must be one of replicate, zero1, zero2, fsdp"),
        ("--micro-batches -1", 1, "--micro-batches must be 0 or more; got -1"),
        ("--keep 0", 1, "--keep must be positive; got 0"),
        ("--save-every 0", 1, "--save-every must be positive; got 0"),
        ("--eval-every 0", 1, "--eval-every must be positive; got 0"),
        ("--eval-size 0", 1, "--eval-size must be positive; got 0"),
        ("--seq 0", 1, "--seq must be positive; got 0"),
        ("--max-skipped 0", 1, "--max-skipped must be positive; got 0"),
        ("--warmup -1", 1, "--warmup must be 0 or more; got -1"),
        ("--seed -1", 1, "--seed must be 0 or more; got -1"),
        ("--shared -1", 1, "--shared must be 0 or more; got -1"),
        ("--tp 2 --top-k 2 --shared 1 --hidden 5", 2, "(top-k + shared) x hidden (15) must be a multiple of 2 = tp"),
        ("--capacity-factor -2", 1, "--capacity-factor must be 0 or more; got -2.0"),
        ("--capacity-factor inf", 1, "--capacity-factor must be 0 or more; got inf"),
        ("--aux-weight nan", 1, "--aux-weight must be 0 or more; got nan"),
        ("--peak-tflops -1", 1, "--peak-tflops must be 0 or more; got -1.0"),
        ("--lr nan", 1, "--lr must be positive; got nan"),
        ("--lr -0.001", 1, "--lr must be positive; got -0.001"),
        ("--lr 0", 1, "--lr must be positive; got 0.0"),
        ("--gate topp", 1, "--gate must be one of topk, switch"),
        ("--balance tokens", 1, "--balance must be one of sequence, global, local"),
        ("--on-nonfinite go", 1, "--on-nonfinite must be one of stop, skip"),
        ("--heads 5", 1, "--dim (128) must be a multiple of 10 = 2 x heads"),
        ("--top-k 9", 1, "--top-k (9) must be at most --experts (8)"),
        ("--gate gshard --top-k 3", 1, "the gshard gate needs top_k=2; got top_k=3"),
        ("--hidden 9 --etp 2", 2, "--hidden (9) must be a multiple of 2 = etp"),
        ("--tp 2 --heads 1", 2, "--heads (1) must be a multiple of 2 = tp"),
        ("--tp 2 --seq 7", 2, "--seq (7) must be a multiple of 2 = cp x tp"),
        ("--cp 8 --cp-attention ulysses", 8, "Ulysses: heads=4 with kv_heads=4 do not split over cp=8 x tp=1 ranks"),
        ("--cp 8 --seq 24", 8, "--seq (24) must be a multiple of 16 = 2 x cp x tp"),
        ("--cp 8 --windows 4", 8, "ring attention has no dropout, windows or documents"),
        ("--tp 3 --heads 3 --dim 6 --seq 9 --hidden 9 --experts 3", 3, "the vocabulary (256) must be a multiple of 3"),
        ("--heads 4 --kv-heads 3", 1, "--heads (4) must be a multiple of 3 = kv-heads"),
        ("--tp 2 --kv-heads 1", 2, "--kv-heads (1) must be a multiple of 2 = tp"),
        ("--moe-every 5", 1, "--moe-every (5) must be at most --layers (4), or no block has experts"),
        ("--pp 2 --layers 1", 2, "--layers (1) must be at least 2: --schedule 1f1b cuts the model into 2 stages"),
        ("--pp 2 --layers 3 --schedule zbv", 2, "--layers (3) must be at least 4: --schedule zbv"),
        ("--pp 4 --micro-batches 2", 4, "--micro-batches (2) must be at least pp (4) with --schedule 1f1b; 0 takes"),
        ("--pp 2 --micro-batches 7 --schedule interleaved1f1b --batch 28", 2, "--micro-batches (7) must be a multiple"),
        ("--moe-layers 2,7", 1, "moe_every has the block 7, but the last one is 4"),
        ("--moe-layers 2;3", 1, "a list of numbers is written as in 2,5-7; got '2;3'"),
        ("--windows 64-0", 1, "a range goes from the smaller number to the larger, as in 5-7; got '64-0'"),
        ("--eod 0 --cp 4 --cp-attention ring", 4, "--join-documents leaves out documents"),
        ("--mtp -1", 1, "--mtp must be 0 or more; got -1"),
        ("--batch 6 --accumulate 4", 1, "--batch (6) must be a multiple of 4 = dp x micro-batches x accumulate"),
        ("--optimizer lion", 1, "--optimizer must be one of adamw, muon"),
        ("--lr-schedule step", 1, "--lr-schedule must be one of cosine, linear, wsd"),
        ("--lr-end 1.5", 1, "--lr-end must be at most 1.0; got 1.5"),
        ("--lr-decay 0", 1, "--lr-decay must be positive; got 0.0"),
        ("--ema 1", 1, "--ema must be below 1; got 1.0"),
        ("--dense --forced-balance", 1, "--forced-balance needs experts: leave out --dense"),
        ("--dense --fp8", 1, "--fp8 needs experts: leave out --dense"),
        ("--bf16 --fp16", 1, "--bf16 and --fp16 exclude each other"),
    ],
)
def test_flags_that_do_not_fit(flags, ranks, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        options.parse(flags.split()).fit(ranks)


@pytest.mark.parametrize(("ranks", "flags", "ep"), [(4, "", 4), (6, "", 2), (8, "--pp 2 --etp 2", 2), (4, "--ep 1", 1)])
def test_ep_is_what_divides_ranks_and_experts(ranks, flags, ep):
    assert options.parse(["--batch", "24", "--eval-size", "24", *flags.split()]).fit(ranks).ep == ep


@pytest.mark.parametrize(("ranks", "flags", "cut"), [(2, "", 1), (4, "--pp 2", 2), (4, "--pp 4 --micro-batches 8", 8)])
def test_micro_batches_are_what_the_pipeline_needs(ranks, flags, cut):
    assert options.parse(flags.split()).fit(ranks).micro_batches == cut


def test_lists_of_blocks_and_windows():
    config = options.parse(["--layers", "6", "--moe-layers", "2,4-6", "--windows", "64,64,0", "--mtp", "1"]).config()
    assert (config.moe_every, config.windows) == ((2, 4, 5, 6), (64, 64, 0))
    assert config.moe_layers() == [
        *(f"blocks.{index}.feed_forward" for index in (1, 3, 4, 5)),
        "mtp.0.blocks.0.feed_forward",
    ]


def test_flags_that_are_unknown_or_of_another_type():
    for flags, message in (
        ("--step 3", "unrecognized arguments: --step 3"),
        ("--steps x", "--steps: invalid int value"),
    ):
        with pytest.raises(ValueError, match=message):
            options.parse(flags.split())


def test_help_says_every_default(capsys):
    with pytest.raises(SystemExit):
        options.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name, value in asdict(Job()).items():
        told = {"": "none", False: "no"}.get(value, value) if isinstance(value, str | bool) else value
        assert re.search(
            rf"{options.flag(name)} .*?\(default: {'Python' if name == 'data' else re.escape(str(told))}", said
        )
    assert "steps between two evaluations (default: 50)" in said


def fit(name: str, ranks: int) -> tuple[dict, int]:
    """Sizes of the axes and bytes of this rank's parameters, on ranks of which only this one exists."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    job = options.parse(["--config", str(of(name))]).fit(ranks)
    meshes = Meshes.of("cpu", pp=job.pp, tp=job.tp, ep=job.ep, etp=job.etp, ranks_per_node=8)
    with torch.device("meta"):
        parts = Stages.of(job.config(), job.schedule, job.pp).build(0) if job.pp > 1 else [GPT(job.config())]
    for part in parts:
        tensor_parallel(part, meshes.dense["tp"])
    sizes = dict(zip(axes.names(meshes.dense), meshes.dense.shape, strict=True))
    sizes |= dict(zip(axes.names(meshes.experts), meshes.experts.shape, strict=True))
    held = 0
    for part in parts:
        for name, p in part.named_parameters():
            own = p.to_local() if isinstance(p, DTensor) else p
            held += own.nbytes // (job.ep * job.etp if ".experts." in name else 1)
    return {axis: size for axis, size in sizes.items() if size > 1}, held


@pytest.mark.parametrize(
    ("name", "sizes", "gigabytes"),
    [
        ("laptop", {"pp": 2, "tp": 2, "ep": 2}, 0.01),
        ("one_node", {"dp": 8, "ep": 8}, 2),
        ("cluster", {"pp": 4, "dp": 64, "tp": 2, "edp": 16, "ep": 8}, 8),
    ],
)
def test_files_fit_the_ranks_they_are_for(name, sizes, gigabytes):
    ((found, held),) = run(1, fit, name, CONFIGS[name])
    assert found == sizes
    assert gigabytes / 10 < held / 1e9 < gigabytes


TOOLS = {"torchrun": 'echo "torchrun $@"', "srun": 'exec "$@"', "scontrol": "echo node0; echo node1"}


@pytest.mark.parametrize(("script", "config"), SCRIPTS.items())
def test_scripts_start_the_job_with_flags_it_has(tmp_path, script, config):
    for tool, body in TOOLS.items():
        (tmp_path / tool).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / tool).chmod(0o755)
    file = ROOT / "examples" / f"{script}.sh"
    assert subprocess.run(["bash", "-n", str(file)]).returncode == 0
    flags = [*([] if script == "slurm" else ["--config", str(of(config))]), "--seed", "3"]
    (tmp_path / "out" / "step-100").mkdir(parents=True)
    given = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        **{"NODES": "2", "HEAD": "node0:29500", "OUT": str(tmp_path / "out")},
        **{"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"},
    }
    done = subprocess.run(["bash", str(file), *flags], cwd=ROOT, env=given, capture_output=True, text=True, check=True)
    launcher, _, job = done.stdout.strip().partition(" examples/pretrain.py ")
    parsed = get_args_parser().parse_args([*launcher.split()[1:], "job.py"])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_endpoint) == ("2", "8", "node0:29500")
    found = options.parse(job.split())
    assert found == replace(
        options.parse(["--config", str(of(config))]),
        seed=3,
        **({"out": str(tmp_path / "out"), "resume": True} if script == "slurm" else {}),
    )


def test_a_script_says_what_it_wants():
    done = subprocess.run(["bash", str(ROOT / "examples" / "multi_node.sh")], capture_output=True, text=True, env={})
    assert done.returncode
    assert "set it to the number of nodes" in done.stderr


def test_shared_experts_count_in_the_width_of_dense_blocks():
    """So a dense twin has equal FLOPs per token, but for the router."""
    flags = ["--hidden", "24", "--dim", "16", "--heads", "2", "--top-k", "1", "--shared", "2"]
    mixture, twin = (GPT(options.parse([*flags, *more]).config()) for more in ([], ["--dense"]))
    routers = 2 * 8 * 16
    assert mixture.active_parameters() == twin.active_parameters() + routers
    assert twin.blocks[1].feed_forward.up.weight.shape == (72, 16)
