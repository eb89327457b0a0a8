"""A checkpoint written while training goes on is the one that was asked for, or its failure is told to every rank."""

from __future__ import annotations

import errno
import multiprocessing as mp
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import outcomes, run
from test_moving import advance, contents
from test_moving import build as build_on
from test_oracle import CASES, Case
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from turnout.models import checkpoint
from turnout.models.checkpoint import (
    AsyncCheckpointer,
    CheckpointError,
    WriteError,
    load,
    load_newest,
    newest,
    save,
    snapshot,
)
from turnout.models.checkpoint.host_copies import HostCopies


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def small(value: float = 0.0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same on every rank; no process group is needed."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW((model := nn.Linear(4, 4)).parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    model.weight.data.fill_(value)
    return model, optimizer


@contextmanager
def held(name: str = "write_values") -> Iterator[threading.Event]:
    """Writing waits until the event is set."""
    may_write, real = threading.Event(), getattr(snapshot, name)

    def write(*args):
        assert may_write.wait(60)
        return real(*args)

    with mock.patch.object(snapshot, name, write):
        yield may_write
        may_write.set()


def change_while_it_is_written(ranks: int, folder: Path) -> tuple[dict, dict, list[float]]:
    """What was there at the save, what is read from the checkpoint, and the losses of training meanwhile."""
    model, optimizer = build_on(Case(ranks, {"ep": ranks}))
    advance(model, optimizer, 0)
    before, rank = contents(model, optimizer), dist.get_rank()
    extra, own = {"list": [1]}, {"rank": rank, "tensor": torch.ones(2)}
    with AsyncCheckpointer(folder) as checkpointer:
        with held() as may_write:
            assert checkpointer.save(model.parts, optimizer, 1, extra, own) is None
            extra["list"].append(2)
            own["tensor"].zero_()
            losses = []
            for step in (1, 2, 3):
                losses.append(advance(model, optimizer, step))  # with collectives of its own
                assert checkpointer.poll() is None
            assert newest(folder) is None
            dist.barrier()
            may_write.set()
        saved = checkpointer.wait()
        assert (saved.path, saved.step) == (folder / "step-1", 1)
        assert 0 < saved.stalled < saved.seconds
        assert checkpointer.wait() is checkpointer.poll() is None
    other, into = build_on(Case(ranks, {"ep": ranks}), seed=1)
    loaded = load(folder / "step-1", other.parts, into)
    assert loaded.extra == {"list": [1]}
    assert loaded.rank_state["rank"] == rank
    assert torch.equal(loaded.rank_state["tensor"], torch.ones(2))
    return before, contents(other, into), losses


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def undisturbed(ranks: int) -> list[float]:
    model, optimizer = build_on(Case(ranks, {"ep": ranks}))
    return [advance(model, optimizer, step) for step in range(4)][1:]


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_saved_is_what_was_there_and_training_is_not_disturbed(tmp_path, ranks):
    expected = run(ranks, undisturbed, ranks)
    for rank, (before, read, losses) in enumerate(run(ranks, change_while_it_is_written, ranks, tmp_path)):
        same(read, before)
        assert losses == expected[rank]


def on_a_mesh(name: str, folder: Path) -> tuple[dict, dict]:
    model, optimizer = build_on(CASES[name])
    advance(model, optimizer, 0)
    before = contents(model, optimizer)
    with AsyncCheckpointer(folder) as checkpointer, held() as may_write:
        checkpointer.save(model.parts, optimizer, 1)
        may_write.set()
        for step in (1, 2):
            advance(model, optimizer, step)
    other, into = build_on(CASES[name], seed=1)
    load(folder / "step-1", other.parts, into)
    return before, contents(other, into)


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["dp2 tp2 ep2 fsdp", "pp2 1f1b", "ep2", "dp2 zero1", "dp2 fsdp", "tp2"])
def test_every_kind_of_parallel_model_comes_back_to_the_bit(tmp_path, name):
    for before, read in run(CASES[name].ranks, on_a_mesh, name, tmp_path):
        same(before, read)


def test_a_save_waits_for_the_one_before_and_older_ones_are_pruned_unread(tmp_path):
    with (
        AsyncCheckpointer(tmp_path, keep=2) as checkpointer,
        mock.patch.object(checkpoint, "is_sound", side_effect=AssertionError("what was written is not read again")),
    ):
        model, optimizer = small()
        assert checkpointer.save(model, optimizer, 1) is None
        for step in (2, 3):
            checkpointer.save(model, optimizer, step)
        told = checkpointer.save(model, optimizer, 4)
        assert (told.step, told.path) == (3, tmp_path / "step-3")
    assert names(tmp_path) == ["step-3", "step-4"]
    assert load_newest(tmp_path, model, optimizer).step == 4


def test_copies_are_made_in_the_same_memory():
    copies, model = HostCopies(), small(1.0)[0]
    first = copies.of({"weight": model.weight, "step": 3})
    assert first["step"] == 3
    model.weight.data.fill_(2.0)
    assert (first["weight"] == 1).all()
    second = copies.of({"weight": model.weight})
    assert second["weight"].data_ptr() == first["weight"].data_ptr()
    assert (second["weight"] == 2).all()
    assert copies.of({"weight": torch.ones(3)})["weight"].shape == (3,)
    assert not second["weight"].requires_grad


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


def refused(folder: Path) -> list[str]:
    model, optimizer = small()
    said = []
    with AsyncCheckpointer(folder) as checkpointer:
        checkpointer.save(model, optimizer, 1)
        for step, extra, rank_state in ((1, {}, None), (2, {"not": object()}, None), (2, {}, Path("x")), (2, {}, None)):
            if (step, extra, rank_state) == (2, {}, None) and dist.get_rank() == 1:
                model.weight.data[0, 0] = float("nan")
            with pytest.raises(CheckpointError) as caught:
                checkpointer.save(model, optimizer, step, extra, rank_state)
            said.append(str(caught.value).partition("\n")[0])
        assert checkpointer.wait() is None
        assert dist.get_rank() != 0 or names(folder) == ["step-1"]
    return said


def test_what_cannot_be_saved_is_refused_at_once(tmp_path):
    first, second = run(2, refused, tmp_path)
    assert first == second
    words = ["step-1 exists already", "rank 0: TypeError: Object of type object", "rank 0: UnpicklingError: Weights"]
    for said, word in zip(first, [*words, "rank 1: model.weight and 0 other tensors have NaN"], strict=True):
        assert word in said


def test_numbers_that_are_not_positive_are_refused(tmp_path):
    with pytest.raises(ValueError, match="keep must be positive; got 0"):
        AsyncCheckpointer(tmp_path, keep=0)
    with pytest.raises(ValueError, match="timeout must be positive; got -1"):
        AsyncCheckpointer(tmp_path, timeout=-1)


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
        target = {"rename": Path, "prune": checkpoint}.get(phase, snapshot)
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
    draw, last = random.Random(0), 0
    for _ in range(request.config.getoption("fuzz") or 5):
        outcomes(2, save_until_killed, tmp_path, draw.randrange(2), draw.uniform(0.03, 0.3), patience=5, timeout=60)
        found = newest(tmp_path)
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


def travelling(folder: Path, asynchronous: bool) -> int:
    """Bytes of the largest object that a rank sends while it saves."""
    sizes, real = [], distributed_c10d._object_to_tensor

    def noting(value: object, *args: object) -> tuple[Tensor, Tensor]:
        data, size = real(value, *args)
        sizes.append(int(size))
        return data, size

    extra = {"log": "x" * 10**6 if dist.get_rank() == 0 else "of another rank"}
    with mock.patch.object(distributed_c10d, "_object_to_tensor", noting):
        if asynchronous:
            with AsyncCheckpointer(folder) as checkpointer:
                checkpointer.save(*small(), 1, extra)
        else:
            save(folder, *small(), 1, extra)
    assert len(sizes) > 4
    assert load(folder / "step-1", *small()).extra == {"log": "x" * 10**6}
    return max(sizes)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_extra_is_rank_0s_and_does_not_travel(tmp_path, asynchronous):
    assert max(run(2, travelling, tmp_path, asynchronous)) < 20_000
    assert sum(file.stat().st_size for file in (tmp_path / "step-1").iterdir()) < 1.5 * 10**6


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Path]:
    """A file system of 300 KiB."""
    (folder := tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here, which needs root: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def save_often(checkpointer: AsyncCheckpointer, *pair: Any) -> None:
    for step in range(1, 9):
        checkpointer.save(*pair, step)


def test_a_full_disk_keeps_what_it_has_and_takes_a_save_when_there_is_room(tiny_disk):
    model = nn.Linear(128, 128)  # 64 KiB
    optimizer = torch.optim.SGD(model.parameters())
    with AsyncCheckpointer(tiny_disk) as checkpointer:
        with pytest.raises(WriteError) as caught:
            save_often(checkpointer, model, optimizer)
        full = int(caught.value.args[0].partition("step-")[2].partition(".")[0])
        assert "is full or over its quota, with " in str(caught.value)
        assert full > 1
        assert names(tiny_disk) == [f"step-{step}" for step in range(1, full)]
        shutil.rmtree(tiny_disk / "step-1")
        checkpointer.save(model, optimizer, full)
    assert load_newest(tiny_disk, model, optimizer).step == full
