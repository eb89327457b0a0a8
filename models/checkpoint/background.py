"""Asynchronous checkpoints: a thread writes them while training goes on."""

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

from ...dispatch.timeout import default_timeout, seconds
from .contents import Model
from .host_copies import HostCopies
from .snapshot import Snapshot
from .store import PathLike, prune
from .together import place, together

_log = logging.getLogger(__package__)  # turnout.models.checkpoint


class Saved(NamedTuple):
    """Report of a checkpoint that an `AsyncCheckpointer` has written."""

    path: Path
    step: int
    stalled: float  # seconds that training waited in `save`
    seconds: float  # seconds from the call of `save` until the checkpoint was complete on the disk


class AsyncCheckpointer:
    """Saves checkpoints while training goes on: training waits for a copy to host memory, and a thread writes it.

    All ranks make one, and call each method at the same place of their loops. The thread has its own process group.
    An error in it is raised by the next call of `poll`, `wait` or `save`, on every rank::

        with AsyncCheckpointer("runs/mine", keep=3) as checkpointer:
            for step in range(1, 1001):
                train(model, optimizer)
                if step % 100 == 0:
                    checkpointer.save(model, optimizer, step)

    Leaving the `with` block waits for the last checkpoint. A process that ends earlier leaves step-N.incomplete.

    Args:
        folder: path of the folder, the same on all ranks.
        keep: number of checkpoints that stay; `prune` deletes the others after each save. None, the default, keeps all.
        timeout: time in seconds, or a timedelta, that a rank's thread waits for the others. None, the default, is the
            timeout of `init_process_group`.

    Raises:
        ValueError: `keep` or `timeout` is not positive.
    """

    def __init__(self, folder: PathLike, keep: int | None = None, timeout: timedelta | float | None = None) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be positive; got {keep}")
        self._folder, self._keep, limit = Path(folder), keep, seconds(timeout)
        self._calls, self._writing = _own_group(limit), _own_group(limit)  # one for the methods, one for the thread
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[Saved] | None = None

    def save(
        self, model: Model, optimizer: Optimizer, step: int, extra: dict | None = None, rank_state: Any = None
    ) -> Saved | None:
        """Copy a checkpoint to host memory, and start to write it. It first waits for the checkpoint before.

        The arguments are as for `turnout.models.checkpoint.save`.

        Returns:
            Report of the checkpoint before, or None if there is none or it was returned already.

        Raises:
            CheckpointError: on every rank. Either the checkpoint before failed, and this one was not started. Or this
                one has values that cannot be saved, such as NaN, and nothing of it is written.
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
        """Report of the running checkpoint if all ranks have finished it, without waiting for them; otherwise None.

        Each checkpoint is returned once. While one is being written, the call costs an all-reduce of one number.

        Raises:
            CheckpointError: on every rank, if it could not be written. A `WriteError` if the disk is the cause.
        """
        if self._running is None:
            return None
        done = torch.tensor(int(self._running.done()))
        if dist.is_initialized():
            dist.all_reduce(done, dist.ReduceOp.MIN, self._calls)
        return self.wait() if done else None

    def wait(self) -> Saved | None:
        """Wait for the running checkpoint, and return its report. None if there is none, or it was returned already.

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
        """Wait for the running checkpoint, and free the thread, its process groups and the host memory.

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
        """Write a copied snapshot, and prune. Runs in the thread."""
        snapshot.write(self._writing)
        saved = Saved(snapshot.path, step, stalled, time.monotonic() - began)
        if self._keep is not None:
            prune(self._folder, self._keep, sound=snapshot.path, group=self._writing)
        return saved


def _own_group(timeout: timedelta | None) -> ProcessGroup | None:
    """New gloo group of all ranks; None in a process without process groups."""
    if not dist.is_initialized():
        return None
    group = dist.new_group(timeout=timeout or default_timeout(), backend="gloo")
    assert isinstance(group, ProcessGroup)
    return group
