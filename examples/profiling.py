"""Profile of a few training steps by torch.profiler, for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import launch
import torch

BEFORE, WARM_UP = 3, 2  # steps before the trace, and how many of them the profiler needs to warm up


@contextmanager
def profiled(steps: int, folder: Path) -> Iterator[Callable[[], None]]:
    """Context that traces `steps` training steps of this rank, after BEFORE others; 0 traces none.

    It yields a function to call after each step. The trace is written to `folder` once it is complete, or when the job
    ends, with the steps so far.
    """
    if not steps:
        yield lambda: None
        return
    path, written = folder / f"rank-{launch.RANK}.json.gz", []

    def save(profile: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(path))
        written.append(path)
        launch.say(f"profile of each rank: {folder}")

    schedule = torch.profiler.schedule(wait=BEFORE - WARM_UP, warmup=WARM_UP, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=save) as profile:
        yield profile.step
    if not written:
        launch.say(f"--profile: no trace was written, since the job ended within the first {BEFORE} steps")
