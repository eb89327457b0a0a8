"""HTML page of a run report: a headline with state and newest numbers, then one section per topic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from . import panels
from .experts import experts
from .lists import events, settings
from .log import Log
from .parts import NONE, Section, duration, large, moment, number, text, tile
from .style import CSS

# The page loads nothing and runs no script, whatever text a log holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">{refresh}
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<header>
{header}
</header>
<main>
{main}
</main>
<footer>{footer}</footer>
</body>
</html>
"""


def page(log: Log, now: float, refresh: int | None = None) -> str:
    """HTML of the whole page at the Unix time `now`. Browsers reload it after `refresh` seconds."""
    name = log.path.resolve().parent.name
    drawn = [panels.loss(log), panels.optimizer(log), panels.speed(log), *experts(log), events(log), settings(log)]
    sections = [section for section in drawn if section.html]
    running = log.state == "running"
    return PAGE.format(
        policy=POLICY,
        refresh=f'\n<meta http-equiv="refresh" content="{refresh}">' if refresh and running else "",
        title=text(f"{name}: {log.state}, step {log.step:,}"),
        css=CSS,
        header=headline(log, name, now) + contents(sections),
        main="\n".join(map(str, sections)),
        footer=text(f"Made {moment(now)} from {log.path.name}, whose last line is of {moment(log.time)}."),
    )


def contents(sections: Sequence[Section]) -> str:
    """HTML of the links to the sections."""
    return "<nav>" + "".join(f'<a href="#{text(each.name)}">{text(each.title)}</a>' for each in sections) + "</nav>"


def headline(log: Log, name: str, now: float) -> str:
    """HTML of state, progress and the newest numbers."""
    total = log.job.get("steps")
    total = total if isinstance(total, int) and total > 0 else None
    kind, state = log.state, log.state
    word = ""
    if silence := silent(log, now):
        kind, state = "silent", f"no log line for {duration(silence)}"
        word = "The log has no end line, and has not grown for longer than usual. The job may be killed, or it hangs."
    elif log.end and state == "failed":
        word = log.end.reason or "The log gives no reason."
    elif log.end and state == "stopped":
        state = log.end.reason
    parts = [f'<h1>{text(name)}</h1><span class="state {kind}">{text(state)}</span>', facts(log)]
    if total:
        parts.append(f'<div class="progress"><i style="width:{min(100.0, 100 * log.step / total):.1f}%"></i></div>')
    if word:
        parts.append(f'<p class="word">{text(word)}</p>')
    shown = tiles(log, total, now)
    columns = len(shown) if len(shown) <= 5 else -(-len(shown) // 2)
    parts.append(f'<dl class="tiles" style="--columns:{columns}">{"".join(shown)}</dl>')
    return "\n".join(parts)


def silent(log: Log, now: float) -> float:
    """Seconds since the last line of a running job, if they are far more than usual; otherwise 0."""
    start = log.starts[-1]
    times = [start.time, *(step.time for step in log.steps if step.time > start.time), log.time]
    usual = max(b - a for a, b in pairwise(times))
    quiet = now - log.time
    patience = max(300.0, 5 * usual) if log.time > start.time else 1800.0  # the first step may compile
    return quiet if log.state == "running" and quiet > patience else 0.0


def facts(log: Log) -> str:
    """HTML line about model, data and ranks."""
    start = log.starts[-1]
    said = []
    if start.parameters:
        active = f", {large(start.active_parameters)} active" if start.active_parameters else ""
        said.append(f"{large(start.parameters)} parameters{active}")
    if start.train_bytes:
        said.append(f"{large(start.train_bytes, 'B')} of text, {large(start.held_out_bytes, 'B')} held out")
    if start.ranks:
        said.append(f"{start.ranks:,} rank{'s' if start.ranks > 1 else ''} on {start.device or 'an unknown device'}")
    if shown := ", ".join(f"{axis} {size}" for axis, size in start.mesh.items() if size != 1):
        said.append(shown)
    if start.run:
        said.append(f"run {start.run}")
    return f'<p class="facts">{text("  ·  ".join(said))}</p>'


def tiles(log: Log, total: int | None, now: float) -> list[str]:
    """HTML of the newest numbers, one tile each."""
    newest = log.steps[-1] if log.steps else None
    shown = [
        tile("Step", f"{log.step:,}", f"of {total:,}" if total else ""),
        tile("Held out", *held_out(log)),
        tile("Train", number(panels.shown(log, newest.loss), ".4f") if newest else NONE, log.unit),
        tile("Time", duration(log.time - log.starts[0].time), left(log, total, now)),
    ]
    if newest:
        rate = [f"{large(newest.tflops_per_s)} TFLOP/s"] if newest.tflops_per_s is not None else []
        rate += [f"MFU {newest.mfu:.1%}"] if newest.mfu is not None else []
        shown.append(tile("Tokens per second", large(newest.tokens_per_s), ", ".join(rate)))
        if newest.memory_bytes is not None:
            shown.append(tile("Memory", large(newest.memory_bytes, "B"), "the most of any rank"))
        for label, values, form in (
            ("Imbalance", newest.imbalance, ".2f"),
            ("Dropped", newest.dropped, ".2%"),
        ):
            known = [(value, layer) for layer, value in enumerate(values, 1) if value is not None]
            if known:
                worst, layer = max(known, key=lambda pair: pair[0])
                where = f"worst: MoE layer {layer}" if worst and len(values) > 1 else ""
                shown.append(tile(label, format(worst, form), where))
        if newest.skipped:
            shown.append(tile("Skipped steps", f"{newest.skipped:,}"))
    if log.restarts:
        again = sum(restart.lost for restart in log.restarts)
        shown.append(tile("Restarts", f"{len(log.restarts):,}", f"{again:,} step{'s' * (again != 1)} done again"))
    return shown


def held_out(log: Log) -> tuple[str, str]:
    """Newest evaluation, and the best one if it is another."""
    known = [(value, each.step) for each in log.held_out if (value := panels.evaluated(each)) is not None]
    if not known:
        return NONE, "no evaluation yet"
    best, step = min(known)
    newest, at = known[-1]
    return f"{newest:.4f}", f"{log.unit}, step {at:,}" if newest == best else f"best {best:.4f}, step {step:,}"


def left(log: Log, total: int | None, now: float) -> str:
    """Estimated time to the last step, from the newest lines since the last start."""
    if log.state != "running" or silent(log, now):
        return ""
    mine = [step for step in log.steps if step.time > log.starts[-1].time][-20:]
    if not total or len(mine) < 2 or mine[-1].step <= mine[0].step:
        return "so far"
    pace = (mine[-1].time - mine[0].time) / (mine[-1].step - mine[0].step)
    return f"about {duration(pace * max(0, total - log.step))} left"
