"""Work on files that all ranks do, or none: what fails on one is raised on all, so that none waits for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says which and why."""


def on_first(work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0: others may still see the folder as it was."""
    return together(lambda: work() if dist.get_rank() == 0 else None)[0]


def together(work: Callable[[], Any]) -> list[Any]:
    """What `work` returns on each rank. If it raises on any, all raise the same CheckpointError."""
    value = raised = None
    try:
        value = work()
    except Exception as error:  # of any kind: the others wait
        text = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        raised = error if isinstance(error, CheckpointError) else CheckpointError(text)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (value, raised))
    for _, error in outcomes:
        if error:
            raise error
    return [value for value, _ in outcomes]
