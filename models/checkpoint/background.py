"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import logging
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

from ...dispatch.mesh import default_timeout, seconds
from .contents import Model
from .host_copies import HostCopies
from .snapshot import Snapshot
from .store import PathLike, prune
from .together import place, together

_log = logging.getLogger(__package__)  # turnout.models.checkpoint


class Saved(NamedTuple):
    """A checkpoint that an AsyncCheckpointer has written."""

    path: Path
    step: int
    stalled: float  # seconds that the caller of `save` waited
    seconds: float  # from the call of `save` until all of it was on the disk under its name


class AsyncCheckpointer:
    """Saves as `save` does, while training goes on: training waits for a copy in host memory, a thread writes it.

    All ranks make it, and call each method at the same place of their loops. The thread has a process group of its own.
    What fails in it is raised by the next call of `poll`, `wait` or `save`, on every rank alike::

        with AsyncCheckpointer("runs/mine", keep=3) as checkpointer:
            for step in range(1, 1001):
                train(model, optimizer)
                if step % 100 == 0:
                    checkpointer.save(model, optimizer, step)

    Leaving the `with` block waits for the last checkpoint. A process that ends earlier, or is killed, leaves it
    step-N.incomplete.

    Args:
        folder: as for `save`.
        keep: how many checkpoints stay; `prune` deletes the others after each save. None: all stay.
        timeout: seconds, or a timedelta, that the thread of one rank waits for the others, such as for the slowest to
            write its part. None: as long as `init_process_group` was told.

    Raises:
        ValueError: `keep` or `timeout` is not positive.
    """

    def __init__(self, folder: PathLike, keep: int | None = None, timeout: timedelta | float | None = None) -> None:
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


def _own_group(timeout: timedelta | None) -> ProcessGroup | None:
    """A new group of all ranks, for the CPU; None in a process without process groups."""
    if not dist.is_initialized():
        return None
    group = dist.new_group(timeout=timeout or default_timeout(), backend="gloo")
    assert isinstance(group, ProcessGroup)
    return group
