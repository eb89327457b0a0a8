"""Work on files that all ranks do, or none: what fails on one is raised on all, so that none waits for another."""

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
    """A checkpoint cannot be written or read; the message says which and why."""


class DamagedError(CheckpointError):
    """A checkpoint cannot be trained from: a file is torn, altered or cannot be read, or a number is not finite."""


class WriteError(CheckpointError):
    """The disk is full, over its quota or at fault. What was to be written is sound: a later try may succeed."""


def place() -> tuple[int, int]:
    """This rank and the number of ranks; a process without a process group is rank 0 of 1."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_first(work: Callable[[], Any], group: ProcessGroup | None = None) -> Any:
    """What `work` returns on rank 0: others may still see the folder as it was. It goes to all ranks: keep it small."""
    return together(lambda: work() if place()[0] == 0 else None, group)[0]


def together(work: Callable[[], Any], group: ProcessGroup | None = None) -> list[Any]:
    """What `work` returns on each rank. If it raises on any, all raise the same CheckpointError.

    Args:
        work: what this rank does; the other ranks wait for it.
        group: a group of all ranks; None: the default group.
    """
    value = raised = None
    rank, ranks = place()
    try:
        value = work()
    except Exception as error:  # of any kind: the others wait
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
    """Raise a WriteError where the disk of `folder` is the cause: torch tells of a wrong position in a file."""
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
