"""Whose checkpoints a folder holds: no job takes another's, and a job that is started again goes on with its own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import launch
import matplotlib.pyplot  # noqa: F401  forked ranks need not import it
import options
import pytest
import torch
import torch.distributed as dist
from main_job import ROOT, TINY, result
from main_job import run as job
from options import DEFINES_RUN, MAY_CHANGE, Job
from ownership import Run
from ranks import errors, run
from turnout.models import checkpoint

ANNOUNCED_BY_NOTHING = {
    *("out", "data", "resume", "allow_changes", "timeout"),
    *("eval_every", "eval_size", "save_every", "keep", "log_every", "peak_tflops", "tensorboard", "profile"),
    *("plan", "ranks", "cluster", "links", "elastic", "tokenizer", "epochs", "watch"),
}


def claim(out: str, resume: bool = False, launcher: str = "", step: int = 0) -> tuple[str, bool]:
    """The run's id, and whether this job goes on with it; `step`: leave a checkpoint of it."""
    launch.RANK, launch.RANKS = dist.get_rank(), dist.get_world_size()
    if launcher:
        os.environ["TORCHELASTIC_RUN_ID"] = launcher
    held = Run.claim(Job(out=out, resume=resume), "text")
    if step:
        model = torch.nn.Linear(2, 2)
        checkpoint.save(out, model, torch.optim.SGD(model.parameters()), step, held.signature())
    return held.id, held.resumes


def test_a_run_is_taken_up_by_resume_or_by_its_launcher_and_by_no_other_job(tmp_path):
    out = str(tmp_path / "run")
    assert all(text == f"ValueError: --resume: there is no checkpoint in {out}" for text in errors(2, claim, out, True))
    begun = run(2, claim, out, False, "one")  # no checkpoint yet: it may begin anew, as the same run
    assert begun[0] == begun[1] == (begun[0][0], False)
    assert run(2, claim, out, False, "one", 3) == begun
    for again in (run(2, claim, out, False, "one"), run(1, claim, out, True)):
        assert set(again) == {(begun[0][0], True)}
    for launcher in ("", "two"):
        for text in errors(2, claim, out, False, launcher):
            assert text.startswith(f"ValueError: {out} holds step-3 of run {begun[0][0]}: continue it by --resume")
    (tmp_path / "run" / "run.json").write_text('{"run": 3}')
    assert "run.json is damaged" in errors(1, claim, out, True)[0]


def two_at_once(out: str) -> str:
    launch.RANK, launch.RANKS = 0, 1
    held = Run.claim(Job(out=out), "text")
    with pytest.raises(ValueError, match="in use by another job") as error:
        Run.claim(Job(out=out), "text")
    held.lock.close()
    Run.claim(Job(out=out), "text")
    assert f"process {os.getpid()} on " in str(error.value)
    assert "launcher is gone" not in str(error.value)
    return str(error.value)


def test_two_jobs_do_not_write_to_one_folder(tmp_path):
    run(1, two_at_once, str(tmp_path))


def test_every_flag_defines_the_run_or_may_change():
    assert {*DEFINES_RUN, *MAY_CHANGE, *ANNOUNCED_BY_NOTHING} == {field.name for field in fields(Job)}


@pytest.mark.parametrize("name", DEFINES_RUN)
def test_a_checkpoint_of_another_model_or_other_data_is_refused(name, capsys):
    before = options.Job()
    value = getattr(before, name)
    other = {bool: lambda: not value, str: lambda: f"{value}2"}.get(type(value), lambda: value + 1)()
    said = Run("id", True, True, False, before, "text").signature()
    now = Job(**{name: other, "lr": 1.0, "pp": 2})
    flag, was = options.flag(name), "none" if value == "" else value
    with pytest.raises(checkpoint.CheckpointError, match=f"other data: {flag} {other} .was {was}.. Use"):
        Run("id", True, True, False, now, "text").accept(3, json.loads(json.dumps(said)))
    allowed = Job(**{name: other, "lr": 1.0, "allow_changes": True})
    Run("id", True, True, False, allowed, "text").accept(3, json.loads(json.dumps(said)))
    assert f"{flag} {other} (was {was}), --lr 1.0 (was 0.004)" in capsys.readouterr().err


def test_what_may_change_is_told_and_other_text_or_another_run_refused(capsys):
    before = Run("id", True, True, False, Job(data=("a",)), "text")
    moved = Run("id", True, True, False, Job(data=("b",), lr=1.0, tp=2, save_every=7), "text")
    moved.accept(3, json.loads(json.dumps(before.signature())))
    assert capsys.readouterr().err == "resuming with --tp 2 (was 1), --lr 1.0 (was 0.004)\n"
    with pytest.raises(checkpoint.CheckpointError, match=r"the data of --data \(its tokens or weights differ\)"):
        Run("id", True, True, False, Job(data=("a",)), "other").accept(3, before.signature())
    with pytest.raises(checkpoint.CheckpointError, match="step 3 is of run id, and runs/pretrain of run other: move"):
        Run("other", True, True, False, Job(), "text").accept(3, before.signature())
    Run("new", True, False, False, Job(), "text").accept(3, before.signature())  # the folder named no run


@pytest.mark.slow
def test_the_job_refuses_what_is_not_its_own(tmp_path, text):
    out, flags = tmp_path / "run", ("--steps", "1", "--data", text)
    result(job(out, *flags))
    left = sorted(path.name for path in out.iterdir())
    again = job(out, *flags)
    assert again.returncode == 2
    assert "holds step-1 of run" in again.stderr
    other = job(out, *flags, "--resume", "--gate", "switch", "--top-k", "1", ranks=2)
    assert other.codes == [2, 2]
    assert other.stderr.count("--top-k 1 (was 2), --gate switch (was topk)") == 1
    assert sorted(path.name for path in out.iterdir()) == left
    sizes = job(out, *flags, "--resume", "--allow-changes", "--hidden", "24")
    assert sizes.returncode == 2
    assert "step-1 does not load: is it of a model of other sizes" in sizes.stderr


def torchrun(*flags: str, out: Path, text: str, launch: tuple[str, ...]) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    given = [*TINY.split(), "--eval-every", "100000", "--data", text, "--out", str(out), *flags]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, "examples/pretrain.py", *given]
    with (out.parent / "said").open("a") as said:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=said)


def saved(out: Path, job: subprocess.Popen) -> None:
    end = time.monotonic() + 100
    while not any(path.name[5:].isdigit() for path in out.glob("step-*")):
        assert job.poll() is None, (out.parent / "said").read_text()
        assert time.monotonic() < end
        time.sleep(0.02)


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_ranks_whose_launcher_is_killed_save_and_end_and_one_that_cannot_is_found(tmp_path, text):
    out = tmp_path / "run"
    how = ("--standalone", "--nproc-per-node", "2")
    first = torchrun("--steps", "100000", "--save-every", "5", out=out, text=text, launch=how)
    saved(out, first)
    ranks = children(first)
    first.kill()
    first.wait()
    end = time.monotonic() + 40
    while any(map(alive, ranks)):
        assert time.monotonic() < end
        time.sleep(0.05)
    said = (tmp_path / "said").read_text()
    (last,) = re.findall(r"stopped by SIGTERM after step (\d+)", said)
    assert (out / f"step-{last}").is_dir()

    (tmp_path / "said").unlink()
    second = torchrun("--steps", "100000", "--resume", out=out, text=text, launch=("--standalone",))
    while f"resuming after step {last}" not in (tmp_path / "said").read_text():
        assert second.poll() is None
        time.sleep(0.02)
    (rank,) = children(second)
    os.kill(rank, signal.SIGSTOP)
    second.kill()
    second.wait()
    refused = job(out, "--steps", "1", "--data", text, "--resume")
    os.kill(rank, signal.SIGKILL)
    assert refused.returncode == 2
    assert f"is in use by another job, process {rank} on " in refused.stderr
    assert "Its launcher is gone: end it by kill -9" in refused.stderr


@pytest.mark.thorough
@pytest.mark.slow
def test_a_node_that_joins_goes_on_with_the_run(tmp_path, text):
    """torchrun --nnodes 1:2 starts the ranks again without counting it as a restart."""
    out = tmp_path / "run"
    how = ("--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-conf", "last_call_timeout=1")
    how += ("--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "joining")
    flags = ("--steps", "600", "--save-every", "50", "--log-every", "300")
    first = torchrun(*flags, out=out, text=text, launch=how)
    saved(out, first)
    second = torchrun(*flags, out=out, text=text, launch=how)
    assert [first.wait(200), second.wait(200)] == [0, 0], (tmp_path / "said").read_text()
    said = (tmp_path / "said").read_text()
    (stopped,) = re.findall(r"stopped by SIGTERM after step (\d+)", said)
    assert f"resuming after step {stopped} of run {json.loads((out / 'run.json').read_text())['run']}" in said
    *_, last = (line for line in said.splitlines() if line.startswith("{"))  # torchrun may warn after it
    assert json.loads(last)["ranks"] == 2


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
