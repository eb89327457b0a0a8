"""Start and end of a rank, under torchrun or alone: process group, SIGTERM, and where a failed job was."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

# torchrun's variables; no other file reads them
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LAUNCHED = "WORLD_SIZE" in os.environ
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
NODES = int(os.environ.get("GROUP_WORLD_SIZE", 1))
RANKS_PER_NODE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
START = timedelta(minutes=10)  # wait for all ranks to start; imports take longer on some machines
GRACE = 4.0  # seconds that a failing rank waits for reports of the others


@contextmanager
def process_group(timeout: timedelta) -> Iterator[torch.device]:
    """Context with a process group of all ranks; yields this rank's device. Collectives raise after `timeout`."""
    if device := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    store = _store(START) if LAUNCHED else dist.HashStore()
    _all_started(store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device else "gloo", store=store, rank=RANK, world_size=RANKS, timeout=timeout
    )
    try:
        yield torch.device("cuda", torch.cuda.current_device()) if device else torch.device("cpu")
    finally:
        dist.destroy_process_group()
        # If a gloo thread frees a tensor while the interpreter exits, the process aborts ("terminate called without an
        # active exception", torch 2.13). The thread ends with its group, and meshes in reference cycles hold groups:
        # collect them now. Groups in DTensor's caches stay, but have this time to free their tensors.
        gc.collect()


def _store(timeout: timedelta) -> dist.Store:
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    if NODES == 1:  # a restarted rank must not find old addresses; for several nodes see docs/guides/cluster.md
        store = dist.PrefixStore(f"start {RESTARTS}", store)
    return store


def _all_started(store: dist.Store) -> None:
    """Wait until all ranks have started, so that the process group may have a short timeout."""
    started = [f"started/{rank}" for rank in range(RANKS)]
    store.set(started[RANK], "")
    try:
        store.wait(started, START)
    except RuntimeError as error:
        late = [rank for rank, key in enumerate(started) if not store.check([key])]
        raise RuntimeError(f"{_ranks(late)} did not start within {START}") from error


class Stop:
    """Tells all ranks if any got SIGTERM. An all-reduce starts with a step and is read at its end, so none waits."""

    def __init__(self) -> None:
        self._told = False
        signal.signal(signal.SIGTERM, self._tell)

    def _tell(self, *_: object) -> None:
        self._told = True

    def ask(self) -> None:
        self._flag = torch.tensor(int(self._told))
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, async_op=True)

    def answer(self) -> bool:
        self._work.wait()
        return bool(self._flag)


def launcher() -> str | None:
    """Identity of the torchrun process of this rank, the same after a restart of the rank; None without torchrun."""
    if (run := os.environ.get("TORCHELASTIC_RUN_ID")) is None:
        return None
    return f"{socket.gethostname()} {os.getppid()} {_stat(os.getppid())[_STARTED:][:1]} {run}"


def parent(process: int) -> int | None:
    """Parent of a process on this machine; None if there is no such process."""
    return int(stat[_PARENT]) if (stat := _stat(process)) else None


_PARENT, _STARTED = 1, 19  # indices of parent and start time in the result of `_stat`


def _stat(process: int) -> list[str]:
    """Fields of a process's /proc/PID/stat, from its state on; [] on other systems, or if there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def end_with_launcher() -> None:
    """Make Linux send this rank SIGTERM when torchrun ends, so that even a killed torchrun leaves no orphans."""
    if not LAUNCHED or sys.platform != "linux":
        return
    before = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != before:
        sys.exit("torchrun has ended")


def say(text: str, every_rank: bool = False) -> None:
    """Print a line to standard error, on rank 0 or on every rank, which is then named if `text` names none."""
    if every_rank or RANK == 0:
        named = re.match(r"rank \d+: ", text)  # by what gathered it from the ranks
        print(f"rank {RANK}: {text}" if every_rank and not named else text, file=sys.stderr, flush=True)


def missing(error: ModuleNotFoundError, extra: str) -> NoReturn:
    """End this rank, with status 2, for a package that is not installed. One rank says which extra brings it."""
    once(needs(error.name, extra))
    sys.exit(2)


def needs(package: str | None, extra: str) -> str:
    """Sentence that says which extra brings a package that is not installed."""
    return f"the package {package} is not installed: pip install -e '.[{extra}]'"


def once(text: str) -> None:
    """Print a line to standard error once, though all ranks call this: the first one prints it."""
    said = False
    with suppress(Exception):  # without a store each rank prints it
        if LAUNCHED:
            known = dist.is_initialized()
            store = dist.distributed_c10d._get_default_store() if known else _store(timedelta(seconds=10))
            key = f"said/{hashlib.sha256(text.encode()).hexdigest()}"
            said = store.add(key, 1) > 1
            if not said:
                say(text, every_rank=True)
            said = True
            if RANK == 0:  # the store may live in this process: keep it for the others
                _wait_for(store, key, RANKS)
    if not said:
        say(text, every_rank=True)


def _wait_for(store: dist.Store, key: str, ranks: int) -> None:
    """Wait until this many ranks have added 1 to a key, or until GRACE is over."""
    end = time.monotonic() + GRACE
    while store.add(key, 0) < ranks and time.monotonic() < end:
        time.sleep(0.05)


def flight_record(out: Path) -> Path | None:
    """Write the record of this rank's last collectives, from torch's flight recorder; None if this torch has none.

    Each entry has the collective, its group, its number in the group, sizes and state. Compare ranks that wait for each
    other. On a GPU, torch's watchdog writes a record of its own at a timeout, for `torchfrtrace`, to the file of
    TORCH_FR_DUMP_TEMP_FILE.
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    if dump is None:
        return None
    file = out / "flight" / f"rank-{RANK}.json"
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(dump(True, False))  # finished collectives as well
        return file
    return None


class Place:
    """Current step and phase of this rank. If the job fails, ranks exchange them.

    Attributes:
        step: number of the step, from 1; 0 before the first one.
        phase: part of the step, such as "training" or "the checkpoint".
    """

    def __init__(self) -> None:
        self.step, self.phase = 0, "the start"

    def at(self, phase: str, step: int | None = None) -> None:
        self.phase, self.step = phase, self.step if step is None else step

    def __str__(self) -> str:
        return f"step {self.step}, in {self.phase}"

    def failed(self) -> str:
        """Sentence that says where this rank failed, where the others did, and which of them do not answer.

        Each rank that fails calls it, inside `process_group`. It takes `GRACE` seconds if a rank does not answer.
        """
        heard = {RANK: str(self)}
        answered: list[int] = []

        def listen() -> None:
            with suppress(Exception):  # the process of the store may have ended
                store = dist.distributed_c10d._get_default_store()
                store.set(f"failed/{RANK}", str(self))
                store.add("failed", 1)
                _wait_for(store, "failed", RANKS)
                answered.extend(rank for rank in range(RANKS) if store.check([f"failed/{rank}"]))
                heard.update({rank: store.get(f"failed/{rank}").decode() for rank in answered})
                store.add("heard", 1)
                if RANK == 0:  # the store may live in this process: keep it for the others
                    _wait_for(store, "heard", len(answered))

        thread = Thread(target=listen, daemon=True)  # a thread, since a store whose process is stopped never answers
        thread.start()
        thread.join(2 * GRACE)
        words = [f"failed at {self}"]
        for place in sorted(set(heard.values()) - {str(self)}):
            words.append(f"{_ranks([r for r in heard if heard[r] == place])} failed at {place}")
        if not answered:
            words.append("the store of the ranks (torchrun's, or rank 0's) does not answer")
        elif silent := [rank for rank in range(RANKS) if rank not in heard]:
            words.append(f"no answer from {_ranks(silent)}: dead, stopped or cut off")
        return "; ".join(words)


def _ranks(some: list[int]) -> str:
    return f"rank {some[0]}" if len(some) == 1 else f"ranks {', '.join(map(str, sorted(some)))}"
