"""Curves as inline SVG. Colours are CSS variables of the page, so that one drawing fits light and dark themes."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import (
    EngFormatter,
    Formatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

from .parts import text

# Okabe and Ito's palette, which colour-blind readers can tell apart; light theme's values of the CSS variables
COLOURS = {
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "sky": "#56b4e9",
    "yellow": "#e69f00",
    "ink": "#101112",
    "muted": "#666768",
    "line": "#d9dadb",
}
LINES = ("blue", "orange", "green", "purple", "sky", "yellow")  # colours of several curves in one chart
SMALL, WIDE = (400, 215), (1160, 330)  # width and height in pixels
STEPS = [1, 2, 2.5, 5, 10]  # distances of ticks, times a power of ten
MOST = 400  # most points of a curve; more are averaged
Kind = Literal["line", "dots", "marks", "bars"]
Form = Literal["plain", "engineering", "bytes", "percent"]
FORMATS: dict[Form, Formatter] = {
    "plain": FuncFormatter(lambda value, _: f"{value:g}"),
    "engineering": EngFormatter(sep=""),
    "bytes": EngFormatter(unit="B"),
    "percent": PercentFormatter(1.0, decimals=None),
}


@dataclass(frozen=True)
class Series:
    """Curve of values over steps.

    Attributes:
        name: name in the legend; "" leaves it out.
        steps: step of each value.
        values: values, as many as steps; None leaves a gap.
        colour: key of `COLOURS`.
        kind: line, line with dots, marks alone, or vertical bars.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float | None]
    colour: str = "blue"
    kind: Kind = "line"

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values as float64 arrays, with NaN for gaps."""
        values = np.array([np.nan if value is None else value for value in self.values], np.float64)
        return np.array(self.steps, np.float64), np.where(np.isfinite(values), values, np.nan)

    @property
    def empty(self) -> bool:
        """Whether there is no finite value."""
        return not np.isfinite(self.arrays()[1]).any()


def chart(
    title: str,
    series: Sequence[Series],
    last: int,
    marks: Sequence[int] = (),
    form: Form = "plain",
    log_scale: bool = False,
    first: int = 0,
    size: tuple[int, int] = SMALL,
) -> str:
    """Draw curves as an SVG element.

    Args:
        title: title of the chart, for screen readers.
        series: curves to draw.
        last: last step on the horizontal axis.
        marks: steps with a dashed vertical line.
        form: format of numbers on the vertical axis, a key of `FORMATS`.
        log_scale: whether to use a logarithmic axis if all values are positive and span more than a factor of 20.
        first: first step on the horizontal axis.
        size: width and height in pixels.
    """
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10}):
        figure = Figure(
            figsize=(size[0] / 72, size[1] / 72), layout=ConstrainedLayoutEngine(w_pad=2 / 72, h_pad=2 / 72)
        )
        axes = figure.add_subplot()
        shown = [step for step in marks if first <= step <= last]
        # many marks become short ticks, so that the curve stays visible
        top, style = (1.0, (0, (3, 3))) if len(shown) <= 24 else (0.05, "solid")
        for step in shown:
            axes.axvline(step, ymax=top, color=COLOURS["purple"], linewidth=1, linestyle=style, zorder=1)
        drawn = [each for each in series if not each.empty]
        for each in drawn:
            _draw(axes, each)
        _scales(axes, drawn, form, log_scale, first, last)
        drawing = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(drawing, format="svg", transparent=True, metadata=nothing)
    return _inline(drawing.getvalue(), title)


def _draw(axes: Axes, series: Series) -> None:
    steps, values = series.arrays()
    colour = COLOURS[series.colour]
    if series.kind == "marks":
        axes.plot(steps, values, linestyle="none", marker="v", markersize=7, color=colour, clip_on=False, zorder=4)
    elif series.kind == "bars":
        axes.vlines(steps, 0, values, color=colour, linewidth=2, clip_on=False)
        axes.plot(steps, values, linestyle="none", marker="o", markersize=4, color=colour, clip_on=False)
    else:
        steps, values, low, high = _thin(steps, values)
        if low is not None and high is not None:
            axes.fill_between(steps, low, high, color=colour, alpha=0.22, linewidth=0)
        dots = series.kind == "dots" or np.isfinite(values).sum() < 3
        marker = {"marker": "o", "markersize": 4, "clip_on": False} if dots and len(steps) <= 80 else {}
        axes.plot(steps, values, color=colour, linewidth=1.5, **marker, zorder=3)


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """At most `MOST` points, each the mean of several values, with their minimum and maximum (None if not averaged)."""
    size = -(-len(steps) // MOST)
    if size <= 1:
        return steps, values, None, None
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    groups = [group[np.isfinite(group)] for group in groups]
    mean, low, high = (
        np.array([how(group) if len(group) else np.nan for group in groups]) for how in (np.mean, np.min, np.max)
    )
    ends = np.minimum(np.arange(len(groups)) * size + size, len(steps)) - 1
    return steps[ends], mean, low, high


def _scales(axes: Axes, drawn: Sequence[Series], form: Form, log_scale: bool, first: int, last: int) -> None:
    values = np.concatenate([each.arrays()[1] for each in drawn] or [np.array([])])
    values = values[np.isfinite(values)]
    if log_scale and len(values) and values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif len(values):
        if any(each.kind == "bars" for each in drawn):
            axes.set_ylim(0, values.max() * 1.08 or 1.0)
        elif values.min() >= 0 and values.min() < 0.25 * values.max():
            axes.set_ylim(bottom=0)  # values come near 0, so the axis starts there
        elif values.max() - values.min() < 1e-3 * abs(values.max()) or not values.any():
            room = abs(values.max()) * 0.1 or 0.05  # nearly constant: do not magnify noise
            axes.set_ylim(values.min() - room if values.min() else 0, values.max() + room)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes.set_xlim(first, max(last, first + 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=STEPS))
    axes.xaxis.set_major_formatter(FORMATS["engineering"])
    axes.yaxis.set_major_formatter(FORMATS[form])
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", color=COLOURS["line"], labelcolor=COLOURS["muted"], length=3)
    axes.tick_params(axis="y", which="both", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(COLOURS["line"])


def _inline(drawing: str, title: str) -> str:
    """Cut an SVG file down to the element that goes into a page."""
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # ids repeat in each chart, and nothing refers to them
    drawing = re.sub(r"\n\s*", "\n", drawing)
    for name, colour in COLOURS.items():
        drawing = drawing.replace(colour, f"var(--{name})")
    box = re.search(r'viewBox="[^"]*"', drawing)
    assert box, "matplotlib writes a viewBox"
    opening = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" aria-label="{text(title)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, drawing, count=1)
