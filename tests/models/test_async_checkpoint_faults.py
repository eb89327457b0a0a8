"""Whatever ends a save half-way: nothing is torn, no rank hangs, and all are told."""

from __future__ import annotations

import errno
import multiprocessing as mp
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checkpoints import names, small, tiny_disk
from ranks import outcomes, run
from torch import nn
from turnout.models.checkpoint import (
    AsyncCheckpointer,
    WriteError,
    background,
    load,
    load_newest,
    newest,
    save,
    snapshot,
)


def fail(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def until_told(checkpointer: AsyncCheckpointer) -> None:
    """Poll; not all ranks as quickly."""
    while checkpointer.poll() is None:
        time.sleep(0.01 * (1 + dist.get_rank()))


def failing_once(folder: Path, call: Callable) -> str:
    """What the next call says after writing failed on rank 1."""
    save(folder, *small(), 1)
    with AsyncCheckpointer(folder, keep=1) as checkpointer:
        with mock.patch.object(snapshot, "_put", fail) if dist.get_rank() == 1 else nullcontext():
            checkpointer.save(*small(), 2)
            with pytest.raises(WriteError) as caught:
                call(checkpointer)
        assert dist.get_rank() != 0 or names(folder) == ["step-1"]
        assert checkpointer.wait() is None  # it is told once
        checkpointer.save(*small(), 3)
    return str(caught.value)


@pytest.mark.parametrize("call", [until_told, AsyncCheckpointer.wait, lambda c: c.save(*small(), 3)])
def test_what_fails_is_raised_on_every_rank_at_the_next_call_and_a_later_save_succeeds(tmp_path, call):
    (said,) = {*run(2, failing_once, tmp_path, call)}
    assert f"rank 1: the disk of {tmp_path}/step-2.incomplete is full or over its quota, with " in said
    assert names(tmp_path) == ["step-3"]


def broken(*_: object) -> None:
    raise KeyError("a mistake in the thread of one rank")


def breaking_down(folder: Path) -> float:
    """Seconds until each rank has an error, if the thread of rank 1 ends without a word to the others."""
    checkpointer, began = AsyncCheckpointer(folder, timeout=2), time.monotonic()
    with mock.patch.object(snapshot, "write_values", broken) if dist.get_rank() == 1 else nullcontext():
        checkpointer.save(*small(), 1)
        with pytest.raises((RuntimeError, KeyError)):
            checkpointer.wait()
    taken = time.monotonic() - began
    checkpointer.close()
    return taken


def test_a_thread_that_breaks_down_does_not_hang_the_others(tmp_path):
    assert max(run(2, breaking_down, tmp_path)) < 2 + 5
    assert newest(tmp_path) is None


def failing_otherwise(folder: Path, late: str) -> None:
    with AsyncCheckpointer(folder) as checkpointer:
        with mock.patch.object(snapshot, "_put", fail) if late == "fails" else nullcontext():
            checkpointer.save(*small(), 1)
            while not checkpointer._running.done():
                time.sleep(0.01)
        raise ArithmeticError("of training")


@pytest.mark.parametrize("late", ["fails", "succeeds"])
def test_an_error_of_training_is_raised_after_the_save_has_ended(tmp_path, late, caplog):
    with pytest.raises(ArithmeticError, match="of training"):
        failing_otherwise(tmp_path, late)
    assert names(tmp_path) == ([] if late == "fails" else ["step-1"])
    assert ("that was being written is lost" in caplog.text) == (late == "fails")


PHASES = {  # what is not done any more, and what is in the folder then
    "write_values": ["step-1", "step-2.incomplete"],
    "_put": ["step-1", "step-2.incomplete"],
    "describe": ["step-1", "step-2.incomplete"],
    "_check_arrived": ["step-1", "step-2.incomplete"],
    "as_list": ["step-1", "step-2.incomplete"],
    "rename": ["step-1", "step-2.incomplete"],
    "prune": ["step-1", "step-2"],
}


def killed(folder: Path, phase: str) -> None:
    """Rank 0 is killed in a phase of the second save, while its main thread goes on."""
    model, optimizer = small(1.0)
    checkpointer = AsyncCheckpointer(folder, keep=1, timeout=5)
    checkpointer.save(model, optimizer, 1, {"of": 1})
    checkpointer.wait()

    def kill(*_: object, **__: object) -> None:
        assert threading.current_thread() is not threading.main_thread()
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 0:
        target = {"rename": Path, "prune": background}.get(phase, snapshot)
        mock.patch.object(target, phase, kill).start()
    model.weight.data.fill_(2.0)
    checkpointer.save(model, optimizer, 2, {"of": 2})
    checkpointer.wait()


@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_in_any_phase_tears_nothing(tmp_path, phase):
    (_, died, _), (_, other, _) = outcomes(2, killed, tmp_path, phase, patience=5, timeout=60)
    assert died == "process died"
    assert "CheckpointError" not in other
    assert "Connection closed by peer" in other or "Connection reset" in other, other
    assert names(tmp_path) == PHASES[phase]
    model, optimizer = small()
    step = 2 if phase == "prune" else 1
    loaded = load_newest(tmp_path, model, optimizer)
    assert (loaded.step, loaded.extra) == (step, {"of": step})
    assert (model.weight == step).all()
    with AsyncCheckpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(model, optimizer, 3)
    assert names(tmp_path) == ["step-3"]


def save_until_killed(folder: Path, rank: int, seconds: float) -> None:
    """Save in every step, from the newest checkpoint on; one rank is killed after a while."""
    model, optimizer = small()
    loaded = load_newest(folder, model, optimizer)
    step = loaded.step if loaded else 0
    assert (model.weight == step).all()
    if dist.get_rank() == rank:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process at once
        signal.setitimer(signal.ITIMER_REAL, seconds)
    with AsyncCheckpointer(folder, keep=2, timeout=5) as checkpointer:
        while True:
            model.weight.data.fill_(step := step + 1)
            checkpointer.save(model, optimizer, step)


def test_kills_at_any_time_lose_and_tear_nothing(tmp_path, request):
    """`--fuzz 200`: so many."""
    draw, last, seconds = random.Random(0), 0, 0.3
    for _ in range(request.config.getoption("fuzz") or 5):
        killed_after = draw.uniform(seconds / 10, seconds)
        outcomes(2, save_until_killed, tmp_path, draw.randrange(2), killed_after, patience=5, timeout=60)
        found = newest(tmp_path)
        seconds = seconds if found else 3 * seconds  # a busy machine takes longer to its first checkpoint
        step = int(found.name[5:]) if found else 0
        assert step >= last
        last = step
        assert len([name for name in names(tmp_path) if not name.endswith(".incomplete")]) <= 3
    model, optimizer = small()
    assert load_newest(tmp_path, model, optimizer).step == last > 0
    assert (model.weight == last).all()


def leave(folder: Path, told: bool) -> None:
    model, optimizer = small()
    checkpointer = AsyncCheckpointer(folder)
    real = snapshot.write_values

    def slow(*args: object) -> None:
        time.sleep(0.5)
        real(*args)

    mock.patch.object(snapshot, "write_values", slow).start()
    checkpointer.save(model, optimizer, 1)
    if told:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        os.kill(os.getpid(), signal.SIGTERM)
    sys.exit(0)


@pytest.mark.parametrize("told", [False, True])
def test_a_process_that_exits_writes_to_the_end(tmp_path, told):
    process = mp.get_context("fork").Process(target=leave, args=(tmp_path, told))
    process.start()
    process.join(60)
    assert process.exitcode == (143 if told else 0)
    assert names(tmp_path) == ["step-1"]
    load(tmp_path / "step-1", *small())


def save_often(checkpointer: AsyncCheckpointer, *pair: Any) -> None:
    for step in range(1, 9):
        checkpointer.save(*pair, step)


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    with tiny_disk(tmp_path / "disk", 300) as folder:
        yield folder


def test_a_full_disk_keeps_what_it_has_and_takes_a_save_when_there_is_room(disk):
    model = nn.Linear(128, 128)  # 64 KiB
    optimizer = torch.optim.SGD(model.parameters())
    with AsyncCheckpointer(disk) as checkpointer:
        with pytest.raises(WriteError) as caught:
            save_often(checkpointer, model, optimizer)
        full = int(caught.value.args[0].partition("step-")[2].partition(".")[0])
        assert "is full or over its quota, with " in str(caught.value)
        assert full > 1
        assert names(disk) == [f"step-{step}" for step in range(1, full)]
        shutil.rmtree(disk / "step-1")
        checkpointer.save(model, optimizer, full)
    assert load_newest(disk, model, optimizer).step == full
