"""Learning-rate schedules: functions of the step alone, so that a resumed job needs no state of them."""

from __future__ import annotations

import math
from collections.abc import Callable

# From the share of the steps done after the warm-up, in [0, 1], and the share of them in which "wsd" decays, to the
# share of the way from the highest to the last learning rate. WSD (warm-up, stable, decay): arXiv:2404.06395.
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": lambda done, decay: (1 - math.cos(math.pi * done)) / 2,
    "linear": lambda done, decay: done,
    "wsd": lambda done, decay: max(0.0, 1 - (1 - done) / decay),
}


def factor(schedule: str, step: int, steps: int, warmup: int, end: float, decay: float) -> float:
    """Factor of the highest learning rate at a step, from 0: a linear warm-up, then the schedule down to `end`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 1 - (1 - end) * SCHEDULES[schedule](done, decay)
