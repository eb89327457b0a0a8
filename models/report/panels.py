"""Sections of curves: loss, optimizer, speed and memory, expert balance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import TypeVar

from .curves import LINES, MOST, WIDE, Form, Kind, Series, chart
from .log import Event, HeldOut, Log, Step
from .parts import Section, large, panel, table

BITS = 1 / math.log(2)  # bits per nat
E = TypeVar("E", bound=Event)


def shown(log: Log, nats: float | None) -> float | None:
    """A loss of training in the unit of the log: bits, or nats."""
    return nats * BITS if nats is not None and log.unit == "bits per byte" else nats


def curve(
    events: Sequence[E], value: Callable[[E], float | None], name: str = "", colour: str = "blue", kind: Kind = "line"
) -> Series:
    """Series of one value of each event."""
    return Series(name, [event.step for event in events], [value(event) for event in events], colour, kind)


def drawn(
    log: Log,
    title: str,
    *series: Series,
    note: str = "",
    form: Form = "plain",
    log_scale: bool = False,
    first: int = 0,
) -> str:
    """HTML of a chart of these series; "" if they are all empty."""
    if all(each.empty for each in series):
        return ""
    drawing = chart(title, series, log.step, restart_steps(log), form, log_scale, first)
    return panel(title, drawing, legend(series), note)


def legend(series: Sequence[Series]) -> list[tuple[str, str]]:
    """Pairs (colour, name) of the series that have a name and values."""
    return [(each.colour, each.name) for each in series if each.name and not each.empty]


def restart_steps(log: Log) -> list[int]:
    """Steps at which to mark restarts."""
    return [restart.start.step for restart in log.restarts]


def grid(*panels: str) -> str:
    """HTML of charts side by side, without empty ones; "" if all are empty."""
    return f'<div class="grid">{"".join(filter(None, panels))}</div>' if any(panels) else ""


def losses(log: Log, first: int = 0) -> list[Series]:
    """Series of the loss of training and held-out text, in the unit of the log, from step `first` on."""
    steps = [step for step in log.steps if step.step >= first]
    held_out = [each for each in log.held_out if each.step >= first]
    return [
        curve(steps, lambda step: shown(log, step.loss), "train"),
        curve(held_out, evaluated, "held out", "green", "dots"),
    ]


def evaluated(event: HeldOut) -> float | None:
    """Loss of an evaluation: bits per byte, or nats per predicted token."""
    return event.loss if event.bits_per_byte is None else event.bits_per_byte


def loss(log: Log) -> Section:
    """Section with the loss over the whole run."""
    title = log.unit.capitalize()
    known = losses(log)
    spikes = curve(log.spikes, lambda spike: shown(log, spike.loss), colour="orange", kind="marks")
    if all(each.empty for each in (*known, spikes)):
        return Section("Loss", panel(title, '<p class="empty">There is no loss yet.</p>'))
    marks = restart_steps(log)
    keys = legend(known) + [("spike", "spike")] * (not spikes.empty) + [("restart", "restart")] * bool(marks)
    draw = partial(chart, title, [*known, spikes], log.step, marks)
    html = f'<div class="wide">{draw(size=WIDE)}</div><div class="narrow">{draw()}</div>'
    note = "A point is the mean over several lines of the log, and the band around the curve is their range."
    return Section("Loss", panel(title, html, keys, "over optimizer steps"), note if len(log.steps) > MOST else "")


def optimizer(log: Log) -> Section:
    """Section with the loss of the second half, the learning rate and the gradient norm."""
    half = log.step // 2
    late = losses(log, half)
    norm = curve(log.steps, lambda step: step.gradient_norm)
    html = grid(
        drawn(log, "Loss, second half", *late, first=half) if len(late[0].values) > 1 else "",
        drawn(log, "Accuracy", curve(log.held_out, lambda each: each.accuracy, "held out", "green", "dots")),
        drawn(log, "Learning rate", curve(log.steps, lambda step: step.lr)),
        drawn(log, "Gradient norm", norm, note="before clipping", log_scale=True),
    )
    return Section("Optimizer", html)


def speed(log: Log) -> Section:
    """Section with throughput, memory and bytes sent."""
    axes = by_axis(log.steps)
    sent = [
        curve(log.steps, partial(_of_axis, axis=axis), axis, colour) for axis, colour in zip(axes, LINES, strict=False)
    ]
    per_rank = "per rank" if len(axes) == len(sent) else f"per rank, {len(sent)} of {len(axes)} axes"
    tokens, tflops, mfu, memory = (
        curve(log.steps, attrgetter(name)) for name in ("tokens_per_s", "tflops_per_s", "mfu", "memory_bytes")
    )
    html = grid(
        drawn(log, "Tokens per second", tokens, note="all ranks", form="engineering"),
        drawn(log, "TFLOP/s", tflops, note="all ranks"),
        drawn(log, "MFU", mfu, note="share of the devices' peak", form="percent"),
        drawn(log, "Memory", memory, note="the most of any rank", form="bytes"),
        drawn(log, "Bytes sent per step", *sent, note=per_rank, form="bytes", log_scale=True),
        traffic(log.steps),
    )
    return Section("Speed and memory", html)


def _of_axis(step: Step, axis: str) -> float | None:
    sent = [n for key, n in step.sent_bytes.items() if key.partition(" ")[0] == axis]
    return sum(sent) if sent else None


def by_axis(steps: Sequence[Step]) -> list[str]:
    """Axes of the mesh that bytes were sent over. The one with most bytes in a step comes first."""
    axes = {key.partition(" ")[0] for step in steps for key in step.sent_bytes}
    most = {axis: max(_of_axis(step, axis) or 0 for step in steps) for axis in axes}
    return sorted(axes, key=lambda axis: (-most[axis], axis))


def traffic(steps: Sequence[Step]) -> str:
    """HTML table of the bytes sent in the newest step, by axis and collective."""
    newest = next((step for step in reversed(steps) if step.sent_bytes), None)
    if newest is None:
        return ""
    total = sum(newest.sent_bytes.values()) or 1
    rows = [
        (*key.partition(" ")[::2], large(n, "B"), f"{n / total:.1%}")
        for key, n in sorted(newest.sent_bytes.items(), key=lambda item: -item[1])
    ]
    html = table(("axis", "collective", "bytes", "share"), rows, numbers=("bytes", "share"))
    return panel(f"Bytes sent in step {newest.step:,}", html, note="per rank")


def balance(log: Log) -> str:
    """HTML of charts of imbalance and dropped tokens; "" for a model without experts."""
    return grid(
        drawn(log, "Imbalance", *_over_layers(log, lambda step: step.imbalance), note="max / mean load"),
        drawn(log, "Dropped", *_over_layers(log, lambda step: step.dropped), note="share", form="percent"),
    )


def _over_layers(log: Log, values: Callable[[Step], list[float | None]]) -> list[Series]:
    def over(how: Callable[[list[float]], float], step: Step) -> float | None:
        known = [value for value in values(step) if value is not None]
        return how(known) if known else None

    if max((len(values(step)) for step in log.steps), default=0) < 2:
        return [curve(log.steps, partial(over, max))]
    return [
        curve(log.steps, partial(over, max), "worst layer", "orange"),
        curve(log.steps, partial(over, statistics.median), "median"),
    ]
