"""Ownership of the folder --out: it belongs to one run, and one job at a time writes to it.

Its file `run.json` has the id of the run, and the launchers (torchrun processes) that last started its ranks. Rank 0
keeps its file `lock` locked as long as it lives.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import launch
import torch.distributed as dist
from launch import say
from options import Job
from turnout.models import checkpoint
from turnout.models.checkpoint import CheckpointError

RELEASE = 5.0  # seconds that a restarted job waits for the lock of the processes that it replaces


@dataclass(frozen=True)
class Run:
    """This job's claim to the folder --out; made by `Run.claim`.

    Attributes:
        id: id of the run, which its checkpoints carry.
        resumes: whether the job resumes from a checkpoint in the folder, by --resume or because torchrun restarted it.
        known: whether the id comes from the folder. If not, it is new.
        restarted: whether torchrun restarted the ranks.
        job: flags of the job.
        text: fingerprint of the data.
        lock: open lock file on rank 0. It keeps other jobs out until it is closed or the process ends.
    """

    id: str
    resumes: bool
    known: bool
    restarted: bool
    job: Job
    text: str
    lock: IO[str] | None = None

    @classmethod
    def claim(cls, job: Job, text: str = "") -> Run:
        """Claim the folder --out for this job. All ranks call it.

        torchrun restarts a job after a failure, or when nodes come or go. Such a job is recognised by its launchers,
        and resumes its run. Any other job needs --resume, or a folder without checkpoints.

        Raises:
            ValueError: on every rank, if another job writes to the folder, if it holds checkpoints of another run, or
                if --resume finds none.
        """
        launchers: list[Any] = [None] * launch.RANKS
        dist.all_gather_object(launchers, launch.launcher())
        run, answer = None, [None]
        if launch.RANK == 0:
            try:
                run = _take(job, text, {each for each in launchers if each})
                answer = [replace(run, lock=None)]
            except (ValueError, OSError) as error:
                answer = [str(error)]
        dist.broadcast_object_list(answer)
        if isinstance(answer[0], str):
            raise ValueError(answer[0])
        return run or answer[0]

    def signature(self) -> dict[str, Any]:
        """Values that a checkpoint carries to name its run."""
        return {"run": self.id, "job": asdict(self.job), "text": self.text}

    def accept(self, step: int, extra: dict[str, Any]) -> None:
        """Refuse a checkpoint of another run, model or data, and report other flags that have changed.

        Raises:
            CheckpointError: the message names the flags that differ.
        """
        if self.known and extra.get("run") != self.id:
            raise CheckpointError(
                f"step {step} is of run {extra.get('run')}, and {self.job.out} of run {self.id}: move it elsewhere"
            )
        others, changed = self.job.changed(extra.get("job", {}))
        if extra.get("text") != self.text:
            others.append("the data of --data (its tokens or weights differ)")
        if others and not self.job.allow_changes:
            raise CheckpointError(
                f"step {step} was trained with another model or other data: {', '.join(others)}. Use the flags that "
                "it was trained with, start a new run in another --out, or accept the changes by --allow-changes"
            )
        if others or changed:
            say(f"resuming with {', '.join(others + changed)}")


def _take(job: Job, text: str, launchers: set[str]) -> Run:
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    held, newest = _read(out / "run.json"), checkpoint.newest(out)
    restarted = bool(launchers & set(held.get("launchers", [])))
    lock = _locked(out / "lock", patience=RELEASE if restarted else 0)
    if job.resume and not newest and not restarted:
        raise ValueError(f"--resume: there is no checkpoint in {out}")
    if newest and not (job.resume or restarted):
        of = f"run {held['run']}" if held else "another run"
        raise ValueError(
            f"{out} holds {newest.name} of {of}: continue it by --resume, name another folder by --out, or delete it"
        )
    known = bool(held and (newest or restarted))
    run = held["run"] if known else uuid.uuid4().hex[:12]
    aside = out / "run.json.incomplete"
    aside.write_text(json.dumps({"run": run, "launchers": sorted(launchers)}))
    aside.replace(out / "run.json")
    return Run(run, bool(newest), known, restarted, job, text, lock)


def _read(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        held = None
    if not (isinstance(held, dict) and isinstance(held.get("run"), str) and isinstance(held.get("launchers"), list)):
        raise ValueError(f"{file} is damaged: delete it, and --resume continues from the newest checkpoint")
    return held


def _locked(file: Path, patience: float) -> IO[str] | None:
    """Lock a file, and write the holder's process into it. Without locks on the file system: None, and a warning."""
    lock = file.open("a+")
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= end:
                lock.seek(0)
                raise ValueError(f"{file.parent} is in use by another job, {_holder(lock.read())}") from None
            time.sleep(0.1)
        except OSError as error:
            say(f"{file} cannot be locked ({error.strerror}): make sure that no other job writes to {file.parent}")
            return None
    lock.truncate(0)
    holder = {"process": os.getpid(), "parent": os.getppid(), "host": socket.gethostname(), "since": time.ctime()}
    print(json.dumps(holder), file=lock, flush=True)
    return lock


def _holder(text: str) -> str:
    """Text about the process that has the lock, and whether its launcher was killed."""
    try:
        holder = json.loads(text)
        words = f"process {holder['process']} on {holder['host']}, since {holder['since']}"
        here = holder["host"] == socket.gethostname()
    except (ValueError, KeyError, TypeError):
        return "which is just starting"
    if here and launch.parent(holder["process"]) not in (None, holder["parent"]):
        words += ". Its launcher is gone: end it by kill -9"
    return words
