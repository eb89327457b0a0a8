"""The curves of the page: loss, optimizer, speed and memory, balance of the experts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial

from .curves import LINES, MOST, WIDE, Series, chart
from .log import Log, Step
from .parts import Section, large, panel, table

BITS = 1 / math.log(2)  # bits of a nat


def bits(nats: float | None) -> float | None:
    """Nats as bits."""
    return None if nats is None else nats * BITS


def curve(log: Log, value: Callable[[Step], float | None], name: str = "", colour: str = "blue") -> Series:
    """A value of each step line."""
    return Series(name, [step.step for step in log.steps], [value(step) for step in log.steps], colour)


def drawn(log: Log, title: str, *series: Series, note: str = "", form: str = "plain", log_scale: bool = False) -> str:
    """A panel with these series; "" if there is nothing in them."""
    if all(each.empty for each in series):
        return ""
    marks = [restart.start.step for restart in log.restarts]
    legend = [(each.colour, each.name) for each in series if each.name]
    return panel(title, chart(title, series, log.step, marks, form, log_scale), legend, note)


def grid(*panels: str) -> str:
    """Panels side by side, without those that are empty; "" if all are."""
    return f'<div class="grid">{"".join(filter(None, panels))}</div>' if any(panels) else ""


def loss(log: Log) -> Section:
    """Loss of training and of held-out text."""
    train = curve(log, lambda step: bits(step.loss), "train")
    held_out = Series(
        "held out", [each.step for each in log.held_out], [each.bits_per_byte for each in log.held_out], "green", "dots"
    )
    spikes = Series(
        "spike", [each.step for each in log.spikes], [bits(each.loss) for each in log.spikes], "orange", "marks"
    )
    series = [train, held_out, spikes]
    if all(each.empty for each in series):
        html = '<p class="empty">There is no loss yet.</p>'
        return Section("Loss", panel("Bits per byte", html))
    marks = [restart.start.step for restart in log.restarts]
    legend = [(each.colour, each.name) for each in (train, held_out) if not each.empty]
    legend += [("spike", "spike")] * (not spikes.empty) + [("restart", "restart")] * bool(marks)
    draw = partial(chart, "Loss in bits per byte", series, log.step, marks)
    html = f'<div class="wide">{draw(size=WIDE)}</div><div class="narrow">{draw()}</div>'
    averaged = len(log.steps) > MOST
    note = (
        "A point is the mean over several lines of the log, and the band around the curve their range."
        if averaged
        else ""
    )
    return Section("Loss", panel("Bits per byte", html, legend, "over optimizer steps"), note)


def optimizer(log: Log) -> Section:
    """Whether the loss still falls, and what the optimizer does."""
    half = log.step // 2
    newest = [
        _after(half, curve(log, lambda step: bits(step.loss), "train")),
        _after(
            half,
            Series(
                "held out", [e.step for e in log.held_out], [e.bits_per_byte for e in log.held_out], "green", "dots"
            ),
        ),
    ]
    marks = [restart.start.step for restart in log.restarts]
    late = ""
    if sum(value is not None for value in newest[0].values) > 1:
        legend = [(each.colour, each.name) for each in newest if not each.empty]
        late = panel("Loss, second half", chart("Loss, second half", newest, log.step, marks, first=half), legend)
    html = grid(
        late,
        drawn(log, "Learning rate", curve(log, lambda step: step.lr)),
        drawn(
            log, "Gradient norm", curve(log, lambda step: step.gradient_norm), note="before clipping", log_scale=True
        ),
    )
    return Section("Optimizer", html)


def _after(step: int, series: Series) -> Series:
    pairs = [(s, v) for s, v in zip(series.steps, series.values, strict=True) if s >= step]
    return Series(series.name, [s for s, _ in pairs], [v for _, v in pairs], series.colour, series.kind)


def speed(log: Log) -> Section:
    """Throughput, memory, and what ranks send."""
    axes = by_axis(log.steps)
    lines = [
        curve(log, lambda step, axis=axis: _of_axis(step, axis), axis, colour)
        for axis, colour in zip(axes, LINES, strict=False)
    ]
    html = grid(
        drawn(
            log, "Tokens per second", curve(log, lambda step: step.tokens_per_s), note="all ranks", form="engineering"
        ),
        drawn(log, "TFLOP/s", curve(log, lambda step: step.tflops_per_s), note="all ranks"),
        drawn(log, "MFU", curve(log, lambda step: step.mfu), note="share of the devices' peak", form="percent"),
        drawn(log, "Memory", curve(log, lambda step: step.memory_bytes), note="the most of any rank", form="bytes"),
        drawn(log, "Bytes sent per step", *lines, note="per rank", form="bytes", log_scale=True),
        traffic(log.steps),
    )
    return Section("Speed and memory", html)


def _of_axis(step: Step, axis: str) -> float | None:
    sent = [n for key, n in step.sent_bytes.items() if key.partition(" ")[0] == axis]
    return sum(sent) if sent else None


def by_axis(steps: Sequence[Step]) -> list[str]:
    """Axes of the mesh that bytes were sent over, the busiest of the newest line first."""
    axes = {key.partition(" ")[0] for step in steps for key in step.sent_bytes}
    return sorted(axes, key=lambda axis: (-(_of_axis(steps[-1], axis) or 0), axis))


def traffic(steps: Sequence[Step]) -> str:
    """A panel: bytes of the newest step by axis and collective."""
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
    """How evenly the experts of all layers are used; "" for a model without them."""
    return grid(
        drawn(log, "Imbalance", *_over_layers(log, lambda step: step.imbalance), note="max / mean load"),
        drawn(log, "Dropped", *_over_layers(log, lambda step: step.dropped), note="share", form="percent"),
    )


def _over_layers(log: Log, values: Callable[[Step], list[float | None]]) -> list[Series]:
    def over(how: Callable[[list[float]], float], step: Step) -> float | None:
        known = [value for value in values(step) if value is not None]
        return how(known) if known else None

    if max((len(values(step)) for step in log.steps), default=0) < 2:
        return [curve(log, partial(over, max))]
    return [
        curve(log, partial(over, max), "worst layer", "orange"),
        curve(log, partial(over, statistics.median), "median"),
    ]
