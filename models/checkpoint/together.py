"""File work on all ranks: an error on one rank is raised on all of them, so that none waits for another."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The message says which one, and why."""


class DamagedError(CheckpointError):
    """A checkpoint is damaged: a file is truncated, altered or unreadable, or a number is NaN or infinite."""


class WriteError(CheckpointError):
    """A checkpoint cannot be written because the disk is full, over its quota or failing. A later try may succeed."""


def place() -> tuple[int, int]:
    """This rank, and the number of ranks: (0, 1) in a process without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_first(work: Callable[[], Any], group: ProcessGroup | None = None) -> Any:
    """Run `work` on rank 0, whose view of the folder counts, and return its result on all ranks: keep it small."""
    return together(lambda: work() if place()[0] == 0 else None, group)[0]


def together(work: Callable[[], Any], group: ProcessGroup | None = None) -> list[Any]:
    """Run `work` on each rank, and return the results of all ranks on all of them.

    Args:
        work: function of this rank; the other ranks wait for it.
        group: group of all ranks. None, the default, is the default group.

    Raises:
        CheckpointError: the same one on every rank, if `work` raises on any.
    """
    value = raised = None
    rank, ranks = place()
    try:
        value = work()
    except Exception as error:  # any kind: the others are waiting
        text = f"rank {rank}: {type(error).__name__}: {error}"
        raised = error if isinstance(error, CheckpointError) else CheckpointError(text)
    outcomes: list[Any] = [(value, raised)] * ranks
    if dist.is_initialized():
        dist.all_gather_object(outcomes, (value, raised), group)
    for _, error in outcomes:
        if error:
            raise error
    return [value for value, _ in outcomes]


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Context that raises a WriteError if the disk of `folder` is at fault; torch's own error names another cause."""
    try:
        yield
    except Exception as error:
        causes = (error, error.__cause__, error.__context__)
        cause = next((each for each in causes if isinstance(each, OSError)), None)
        if cause is None:
            raise
        rank, _ = place()
        if cause.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise WriteError(f"rank {rank}: {type(cause).__name__}: {cause}") from error
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free / 2**20
        raise WriteError(
            f"rank {rank}: the disk of {folder} is full or over its quota, with {free:.1f} MiB free: make room, "
            "or keep fewer checkpoints. Checkpoints written before are as they were"
        ) from error
