"""Simulate a pipeline: the actions that torch.distributed.pipelining schedules, with a time for each.

The order is that of the runtime, because the classes of `SCHEDULES` make it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch

from ..pipeline.engine import SCHEDULES
from .layout import Layout


class StageTimes(NamedTuple):
    """Seconds of one stage for one micro-batch."""

    forward: float
    backward: float  # gradients of the input and of the weights
    weights: float | None = None  # gradients of the weights alone, for schedules that split; None takes half


class Span(NamedTuple):
    """An action, from its start to its end, in seconds from the start of the step."""

    rank: int
    stage: int
    kind: str  # "F", "B", or its halves: "I" for the input's gradient, "W" for the weights'
    micro_batch: int
    start: float
    end: float


class Simulation(NamedTuple):
    """A step of a pipeline."""

    spans: list[Span]
    seconds: float  # from the first start to the last end
    bubble: float  # time that a rank waits over the time it computes, the mean over ranks
    held: list[float]  # for each rank, the most micro-batches in flight, each of all its stages


def actions(schedule: str, ranks: int, virtual: int, micro_batches: int) -> list[list[tuple[str, int, int]]]:
    """The actions of each rank in their order: (kind, stage, micro-batch)."""
    looped, number = schedule not in ("gpipe", "1f1b"), ranks * virtual
    own = [0, number - 1] if schedule == "zbv" else list(range(0, number, ranks)) if looped else [0]
    device = torch.device("cpu")
    stages = [  # all that a schedule reads of a stage to make its order
        SimpleNamespace(
            stage_index=index,
            num_stages=number,
            group_size=ranks,
            group_rank=0,
            group=None,
            is_first=index == 0,
            is_last=index == number - 1,
            device=device,
            submod=None,
            has_backward=False,
        )
        for index in own
    ]
    made = SCHEDULES[schedule](
        stages if looped else stages[0], micro_batches, loss_fn=lambda output, target: output, scale_grads=False
    )
    order = getattr(made, "pipeline_order", None)
    if not order:
        raise ValueError(f"torch {torch.__version__} does not tell the order of {schedule!r}; 2.13 does")
    kinds = ("F", "B", "I", "W")
    plain = [
        [
            (action.computation_type.value, action.stage_index, action.microbatch_index)
            for action in order[rank]
            if action is not None and action.computation_type.value in kinds
        ]
        for rank in range(ranks)
    ]
    return plain if looped else [_first_come(rank) for rank in plain]


def _first_come(own: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Number micro-batches in their order, from 0: torch 2.13 numbers forwards of 1F1B's last rank from 1."""
    seen = {"F": 0, "B": 0}
    numbered = []
    for kind, stage, _ in own:
        numbered.append((kind, stage, seen[kind]))
        seen[kind] += 1
    return numbered


def simulate(layout: Layout, times: Sequence[StageTimes], send: float = 0.0) -> Simulation:
    """Run a step's actions, each as soon as its rank is free and what it needs has arrived.

    Args:
        layout: pp, virtual, schedule and micro_batches are used.
        times: times of each stage, in the order of the model.
        send: seconds from a stage's end to the next one's start on another rank.

    >>> layout = Layout(pp=4, micro_batches=8, schedule="1f1b")
    >>> simulate(layout, [StageTimes(1, 2)] * 4).bubble == 3 / 8
    True
    """
    p, v = layout.pp, layout.virtual
    orders = actions(layout.schedule, p, v, layout.micro_batches)
    if len(times) != p * v:
        raise ValueError(f"{p} ranks with {v} stages need {p * v} times; got {len(times)}")
    owner = {stage: rank for rank, order in enumerate(orders) for _, stage, _ in order}
    ends: dict[tuple[str, int, int], float] = {}
    free, place, spans = [0.0] * p, [0] * p, []

    def ready(rank: int, kind: str, stage: int, micro_batch: int) -> float | None:
        """When the inputs of an action have arrived; None if they are not computed yet."""
        needs = []
        if kind == "F" and stage:
            needs.append(("F", stage - 1))
        elif kind == "W":
            needs.append(("I", stage))
        elif kind in ("B", "I"):
            needs.append(("F", stage))
            if stage + 1 < p * v:
                needs.append(("B" if ("B", stage + 1, micro_batch) in ends else "I", stage + 1))
        at = 0.0
        for what, where in needs:
            end = ends.get((what, where, micro_batch))
            if end is None:
                return None
            at = max(at, end + (0.0 if owner[where] == rank else send))
        return at

    waiting = True
    while waiting:
        waiting, moved = False, False
        for rank, order in enumerate(orders):
            while place[rank] < len(order):
                kind, stage, micro_batch = order[place[rank]]
                at = ready(rank, kind, stage, micro_batch)
                if at is None:
                    waiting = True
                    break
                start = max(at, free[rank])
                free[rank] = ends[kind, stage, micro_batch] = start + _seconds(kind, times[stage])
                spans.append(Span(rank, stage, kind, micro_batch, start, free[rank]))
                place[rank], moved = place[rank] + 1, True
        assert moved or not waiting, "a schedule waits for itself"
    seconds = max(free) - min(span.start for span in spans)
    busy = sum(span.end - span.start for span in spans) / p
    return Simulation(spans, seconds, seconds / busy - 1, [_most_held(order, v) for order in orders])


def _seconds(kind: str, time: StageTimes) -> float:
    weights = time.backward / 2 if time.weights is None else time.weights
    return {"F": time.forward, "B": time.backward, "I": time.backward - weights, "W": weights}[kind]


def _most_held(order: list[tuple[str, int, int]], virtual: int) -> float:
    held = most = 0
    for kind, _, _ in order:
        held += {"F": 1, "B": -1, "I": 0, "W": -1}[kind]
        most = max(most, held)
    return most / virtual
