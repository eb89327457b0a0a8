"""The main job told to stop, killed, and left with a damaged checkpoint: it goes on as if nothing had happened."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from main_job import LAUNCH, ROOT, TINY, result, run

pytestmark = pytest.mark.slow
# noise in the gate, so that random states matter
LONG = ("--steps", "60", "--save-every", "10", "--eval-every", "60", "--gate", "gshard")


def start(out: Path, *flags: str, ranks: int, launch: tuple[str, ...] = ()) -> subprocess.Popen:
    launcher = [*LAUNCH, str(ranks), *launch] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "examples/pretrain.py", *TINY.split(), *LONG, "--out", str(out), *flags],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def saved(out: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in out.glob("step-*") if path.name[5:].isdigit())


def wait_for_a_checkpoint(out: Path, process: subprocess.Popen) -> None:
    for _ in range(12_000):
        if saved(out):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError("no checkpoint within a minute")


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.sampled
@pytest.mark.parametrize(("ranks", "mesh"), [(2, ""), (1, ""), (2, "--pp 2 --micro-batches 2")])
def test_sigterm_saves_and_resume_goes_on_to_the_bit(tmp_path, text, ranks, mesh):
    flags = ("--data", text, *mesh.split())
    whole = result(run(tmp_path / "whole", *LONG, *flags, ranks=ranks))
    out = tmp_path / "stopped"
    job = start(out, *flags, ranks=ranks)
    wait_for_a_checkpoint(out, job)
    job.send_signal(signal.SIGTERM)  # under torchrun to the launcher, which passes it on
    _, log = job.communicate(timeout=200)
    assert job.returncode == 143 if ranks == 1 else job.returncode
    stopped = saved(out)[-1]
    assert f"stopped by SIGTERM after step {stopped}" in log
    assert stopped < 60
    resumed = result(run(out, *LONG, *flags, "--resume", ranks=ranks))
    same = ("loss", "val_bpb", "imbalance", "dropped")
    assert [resumed[key] for key in same] == [whole[key] for key in same]


def test_a_killed_rank_is_started_again_and_loses_only_what_was_not_saved(tmp_path, text):
    job = start(tmp_path, "--data", text, ranks=2, launch=("--max-restarts", "1"))
    wait_for_a_checkpoint(tmp_path, job)
    began = time.monotonic()
    os.kill(children(job)[-1], signal.SIGKILL)
    _, log = job.communicate(timeout=200)
    assert job.returncode == 0, log
    assert "resuming after step" in log
    assert time.monotonic() - began < 120
    assert saved(tmp_path)[-1] == 60


@pytest.mark.thorough
def test_without_restarts_a_killed_rank_ends_the_job_with_a_clear_message(tmp_path, text):
    job = start(tmp_path, "--data", text, ranks=2)
    wait_for_a_checkpoint(tmp_path, job)
    began = time.monotonic()
    os.kill(children(job)[0], signal.SIGKILL)
    _, log = job.communicate(timeout=200)
    assert job.returncode == 1
    assert time.monotonic() - began < 120
    assert "--resume continues from the newest checkpoint" in log


@pytest.mark.sampled
@pytest.mark.parametrize("mesh", ["--pp 2 --tp 2", "--pp 2 --ep 2 --dense", "--tp 2 --data-parallel fsdp"])
def test_a_rank_that_hangs_is_named_and_ends_the_others_in_time(tmp_path, text, mesh):
    """Whatever it is that they wait for: sends of the pipeline, collectives of DTensor, of the experts or of FSDP2."""
    stopped, ended = [], []

    def stop_the_last() -> None:
        while not saved(tmp_path):
            time.sleep(0.01)
        last = max(multiprocessing.active_children(), key=lambda process: process.pid)
        os.kill(last.pid, signal.SIGSTOP)
        stopped.append(time.monotonic())

    watch = threading.Thread(target=stop_the_last, daemon=True)
    watch.start()
    flags = ("--layers", "4", "--steps", "100000", "--save-every", "10", "--eval-every", "100000")
    done = run(tmp_path, *flags, "--data", text, "--timeout", "5", *mesh.split(), ranks=4)
    ended.append(time.monotonic())
    assert done.returncode == 1
    assert ended[0] - stopped[0] < 5 + 10 + 5  # the last are those that `run` waits for the stopped rank
    for rank in range(3):
        assert re.search(
            rf"rank {rank}: failed at step \d+, in (training|the (log|checkpoint)); (.*; )?no answer from rank 3: ",
            done.stderr,
        ), done.stderr
        record = json.loads((tmp_path / "flight" / f"rank-{rank}.json").read_text())
        assert {entry["profiling_name"] for entry in record["entries"]} & {"gloo:all_reduce", "gloo:send"}


def test_a_torn_checkpoint_is_passed_over(tmp_path, text):
    out = tmp_path / "run"
    result(run(out, *LONG, "--data", text, "--steps", "20"))
    torn = out / "step-20" / "__0_0.distcp"
    torn.write_bytes(torn.read_bytes()[:-100])
    done = run(out, *LONG, "--data", text, "--steps", "20", "--resume")
    assert result(done)["steps"] == 20
    assert "is torn" in done.stderr
    assert "resuming after step 10" in done.stderr
