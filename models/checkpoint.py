"""Checkpoints that any number of ranks can read, and that are read whole or not at all.

torch.distributed.checkpoint keeps the contents. What is spread over ranks are DTensors, experts in global order, and
what stages of a pipeline hold goes by the names of the whole model: a checkpoint of one mesh loads on any other.
The rest is the same on every rank and saved once. A checkpoint is written under another name, with the checksum of
each file, and renamed when all of it has reached the disk. What fails on one rank is raised on all of them; so all
ranks call each function here, `newest` excepted. One process needs no process group.

`model` is a module, or the stages of a pipeline that this rank runs, in a list (`ParallelModel.parts`). One optimizer
has the parameters of all of them.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ..dispatch.mesh import default_timeout, seconds
from .contents import Contents, Model
from .host_copies import HostCopies
from .snapshot import Snapshot
from .together import CheckpointError, DamagedError, WriteError, on_first, place, together
from .verify import is_sound, verify

__all__ = [
    "AsyncCheckpointer",
    "CheckpointError",
    "DamagedError",
    "Loaded",
    "Saved",
    "WriteError",
    "load",
    "load_newest",
    "newest",
    "prune",
    "save",
]

_Path = str | os.PathLike[str]
_log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """What a checkpoint holds besides the state of model and optimizer."""

    step: int
    extra: dict[str, Any]
    rank_state: Any  # this rank's; None if the number of ranks is another


def save(
    folder: _Path, model: Model, optimizer: Optimizer, step: int, extra: dict | None = None, rank_state: Any = None
) -> Path:
    """Write model, optimizer, `extra` (what JSON can say) and `rank_state` to folder/step-N; returns that path.

    All ranks write to one folder, on a file system that they share. `extra` is rank 0's, and that of others is ignored.
    `rank_state` is this rank's own, such as its random states: tensors and plain Python values. Until all is on the
    disk the name is step-N.incomplete; what a crash left under such names is removed. A damaged step-N that is in the
    way becomes step-N.damaged.

    Raises:
        WriteError: on every rank, if the disk of one is full or at fault.
        CheckpointError: on every rank, if one has a parameter or optimizer state with NaN or infinity, or another
            folder than rank 0; or if step-N exists already. Other checkpoints are left alone.
    """
    snapshot = Snapshot.of(Path(folder), step, model, optimizer, extra, rank_state)
    snapshot.write()
    return snapshot.path


class Saved(NamedTuple):
    """A checkpoint that an AsyncCheckpointer has written."""

    path: Path
    step: int
    stalled: float  # seconds that the caller of `save` waited
    seconds: float  # from the call of `save` until all of it was on the disk under its name


class AsyncCheckpointer:
    """Saves as `save` does, while training goes on: training waits for a copy in host memory, a thread writes it.

    All ranks make it, and call each method at the same place of their loops. The thread has a process group of its own.
    What fails in it is raised by the next call of `poll`, `wait` or `save`, on every rank alike.

        with AsyncCheckpointer("runs/mine", keep=3) as checkpointer:
            for step in range(1, 1001):
                train(model, optimizer)
                if step % 100 == 0:
                    checkpointer.save(model, optimizer, step)

    Leaving the `with` block waits for the last checkpoint. A process that is killed before leaves it step-N.incomplete.
    The copies stay in host memory, for the next ones.

    Args:
        folder: as for `save`.
        keep: how many checkpoints stay; `prune` deletes the others after each save. None: all stay.
        timeout: seconds, or a timedelta, that the thread of one rank waits for the others, such as for the slowest to
            write its part. None: as long as `init_process_group` was told.

    Raises:
        ValueError: `keep` or `timeout` is not positive.
    """

    def __init__(self, folder: _Path, keep: int | None = None, timeout: timedelta | float | None = None) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be positive; got {keep}")
        self._folder, self._keep, limit = Path(folder), keep, seconds(timeout)
        self._calls, self._writing = _own_group(limit), _own_group(limit)  # of the methods, and of the thread
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[Saved] | None = None

    def save(
        self, model: Model, optimizer: Optimizer, step: int, extra: dict | None = None, rank_state: Any = None
    ) -> Saved | None:
        """Copy what `save` of this module would write, and begin to write it; returns what `wait` does.

        It first waits until the save before is done.

        Raises:
            CheckpointError: on every rank. The save before failed, and this one was not begun; or this one has what
                cannot be saved, such as NaN, and nothing of it is written.
        """
        began = time.monotonic()
        before = self.wait()
        snapshot = Snapshot.of(self._folder, step, model, optimizer, extra, rank_state, self._calls)
        copies: dict[str, Any] = {}
        together(lambda: copies.update(self._copies.of(snapshot.values)), self._calls)
        stalled = time.monotonic() - began
        self._running = self._thread.submit(self._write, snapshot._replace(values=copies), step, began, stalled)
        return before

    def poll(self) -> Saved | None:
        """The checkpoint that was begun, once it is on the disk on all ranks; None until then, and after it was told.

        While one is being written this is an all-reduce of a number, else it costs nothing.

        Raises:
            CheckpointError: on every rank, if it could not be written; a WriteError, if the disk is the cause.
        """
        if self._running is None:
            return None
        done = torch.tensor(int(self._running.done()))
        if dist.is_initialized():
            dist.all_reduce(done, dist.ReduceOp.MIN, self._calls)
        return self.wait() if done else None

    def wait(self) -> Saved | None:
        """Wait for the checkpoint that was begun, and return it; None if there is none, or it was told already.

        Raises:
            CheckpointError: as `poll`.
        """
        if (running := self._running) is None:
            return None
        try:
            return running.result()
        finally:
            if running.done():
                self._running = None

    def close(self) -> None:
        """Wait, and give back the thread, its process groups and the memory; then it cannot save any more.

        Raises:
            CheckpointError: as `poll`.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._copies = HostCopies()
            for group in (self._calls, self._writing):
                if group is not None and dist.is_initialized():
                    dist.destroy_process_group(group)
            self._calls = self._writing = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except Exception as late:
            if error is None:
                raise
            if place()[0] == 0:
                _log.warning("the checkpoint that was being written is lost: %s", late)

    def _write(self, snapshot: Snapshot, step: int, began: float, stalled: float) -> Saved:
        """In the thread."""
        snapshot.write(self._writing)
        saved = Saved(snapshot.path, step, stalled, time.monotonic() - began)
        if self._keep is not None:
            prune(self._folder, self._keep, sound=snapshot.path, group=self._writing)
        return saved


def newest(folder: _Path) -> Path | None:
    """The complete checkpoint of most steps in a folder, damaged or not, as this rank sees it; None without any."""
    return next(iter(_complete(Path(folder))), None)


def load(path: _Path, model: Model, optimizer: Optimizer) -> Loaded:
    """Read a checkpoint into a model and an optimizer, on any mesh; the model's gradients are dropped.

    It may come from anyone: no code in it is run, and no file outside of it is read. A parameter for which it has no
    optimizer state, as it had no gradient yet or was frozen, is as fresh to the optimizer as it was then.

    Raises:
        DamagedError: on every rank, if a file is not what was written, or holds more than tensors and plain values; or
            if a parameter or optimizer state has NaN or infinity.
        CheckpointError: on every rank, if it is of another model or optimizer, or cannot be read to its end. Unless
            the message says that a part was read, model and optimizer are as they were, after each of the errors.
    """
    path = Path(path)
    (files, reader), own = verify(path), []
    rank, ranks = place()
    if {name for name in files if name.startswith("rank-")} == {f"rank-{each}.pt" for each in range(ranks)}:
        together(lambda: own.append(_read_own(path / f"rank-{rank}.pt")))
    optimizer.zero_grad()  # the optimizer may make a step to get its state
    read = Contents(model, optimizer).read(reader, {"step": 0, "extra": ""})
    return Loaded(read["step"], json.loads(read["extra"]), own[0] if own else None)


def load_newest(folder: _Path, model: Model, optimizer: Optimizer) -> Loaded | None:
    """Load the checkpoint of most steps that is not damaged; None if the folder has no checkpoint at all.

    Rank 0 logs a warning for each damaged one passed over, NaN or infinity being such damage; they stay where they are.

    Raises:
        CheckpointError: on every rank, if all are damaged, or the first intact one is of another model.
    """
    folder, damaged = Path(folder), []
    for path in on_first(lambda: _complete(folder)):
        try:
            return load(path, model, optimizer)
        except DamagedError as error:
            damaged.append(str(error))
            if place()[0] == 0:
                _log.warning("%s; trying the one before", error)
    if damaged:
        raise CheckpointError(f"no checkpoint in {folder} is intact: " + "; ".join(damaged))
    return None


def prune(folder: _Path, keep: int, *, sound: Path | None = None, group: ProcessGroup | None = None) -> None:
    """Delete all but the `keep` checkpoints of most steps and the newest sound one.

    Rank 0 deletes, and the others do not wait for it. What it cannot delete it logs.

    Args:
        folder: of the checkpoints.
        keep: how many stay; positive.
        sound: one that stays, known to be sound since `save` has just returned it. None: all ranks share the reading of
            the newest ones to find one.
        group: a group of all ranks; None: the default group.
    """
    if keep < 1:
        raise ValueError(f"keep must be positive; got {keep}")
    paths = on_first(lambda: _complete(Path(folder)), group)
    if len(paths) > keep and sound is None:
        sound = next((path for path in paths if is_sound(path, group)), None)
    kept = {path.name for path in (*paths[:keep], sound) if path}
    for path in paths if sound and place()[0] == 0 else []:
        try:
            if path.name not in kept:
                shutil.rmtree(path.rename(path.with_name(f"{path.name}.incomplete")))
        except OSError as error:
            _log.warning("%s is not deleted: %s", path, error)


def _complete(folder: Path) -> list[Path]:
    """Most steps first."""
    steps = {int(m[1]): path for path in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def _own_group(timeout: timedelta | None) -> ProcessGroup | None:
    """A new group of all ranks, for the CPU; None in a process without process groups."""
    if not dist.is_initialized():
        return None
    group = dist.new_group(timeout=timeout or default_timeout(), backend="gloo")
    assert isinstance(group, ProcessGroup)
    return group


def _read_own(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DamagedError(
            f"{file} holds more than tensors and plain values; it may be code, and was not run"
        ) from None
