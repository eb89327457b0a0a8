"""Tables of a run's events and settings."""

from __future__ import annotations

import statistics
from typing import Any

from .curves import Series
from .log import Log, Start
from .panels import curve, drawn, grid, shown
from .parts import Section, details, duration, moment, number, setting, table, text

MOST = 200  # most rows of a table


def events(log: Log) -> Section:
    """Section with restarts, spikes, skipped steps and checkpoints."""
    html = "\n".join(filter(None, (over_steps(log), restarts(log), spikes(log), skipped(log), checkpoints(log))))
    return Section("Events", html)


def restarts(log: Log) -> str:
    """HTML table of restarts."""
    rows = [
        (
            moment(restart.start.time),
            f"{restart.start.step:,}",
            f"{restart.lost:,}",
            duration(restart.idle),
            "by the launcher" if restart.start.restart else "by hand",
            restart.ended or "killed: the log has no end",
        )
        for restart in log.restarts
    ]
    head = ("time", "from step", "steps done again", "after", "restarted", "how it had ended")
    return _folded(f"Restarts: {len(rows):,}", head, rows, numbers=("from step", "steps done again"), is_open=True)


def spikes(log: Log) -> str:
    """HTML table of losses far above the median."""
    rows = [
        (
            f"{each.step:,}",
            number(shown(log, each.loss)),
            number(shown(log, each.median)),
            each.parameter,
            number(each.rank),
        )
        for each in log.spikes
    ]
    head = ("step", log.unit, "median before", "largest gradient", "rank")
    return _folded(f"Spikes of the loss: {len(rows):,}", head, rows, numbers=head[:3])


def skipped(log: Log) -> str:
    """HTML table of skipped steps."""
    rows, before, count = [], 0, 0
    for step in log.steps:
        if step.skipped > count:
            rows.append((f"{before + 1:,} to {step.step:,}", f"{step.skipped - count:,}"))
        before, count = step.step, step.skipped
    return _folded(f"Skipped steps: {count:,}", ("steps", "skipped"), rows, numbers=("skipped",))


def checkpoints(log: Log) -> str:
    """HTML table of checkpoints."""
    rows = [
        (f"{each.step:,}", moment(each.time), number(each.stall_s, ".2f"), number(each.seconds, ".2f"))
        for each in log.checkpoints
    ]
    head = ("step", "time", "seconds that training stood still", "seconds until on the disk")
    return _folded(f"Checkpoints: {len(rows):,}", head, rows, numbers=(head[0], *head[2:]))


def over_steps(log: Log) -> str:
    """HTML of charts: stalls by checkpoints, time until they were on the disk, and skipped steps."""
    stall = curve(log.checkpoints, lambda each: each.stall_s, kind="bars")
    whole = curve(log.checkpoints, lambda each: each.seconds, kind="bars")
    skips = curve([step for step in log.steps if log.steps[-1].skipped], lambda step: step.skipped, colour="orange")
    return grid(
        drawn(log, "Stalls by checkpoints", stall, note=_median(stall)),
        drawn(log, "Checkpoints on the disk after", whole, note=_median(whole)),
        drawn(log, "Skipped steps", skips, note="so far"),
    )


def _median(seconds: Series) -> str:
    known = [value for value in seconds.values if value is not None]
    return f"seconds, median {statistics.median(known):.2f}" if known else ""


def _folded(title: str, head: tuple[str, ...], rows: list, numbers: tuple[str, ...], is_open: bool = False) -> str:
    """HTML of a table that unfolds. Of more than `MOST` rows it has the newest."""
    if not rows:
        return ""
    if len(rows) > MOST:
        title += f", here the newest {MOST}"
    return details(title, table(head, rows[-MOST:], numbers), is_open)


def settings(log: Log) -> Section:
    """Section with all flags. Flags that a restart changed come first."""
    flags_of = [facts(start) | {_flag(name): value for name, value in start.job.items()} for start in log.starts]
    changed: list[tuple[str, str]] = []
    same: list[tuple[str, str]] = []
    for name in dict.fromkeys(name for values in reversed(flags_of) for name in values):
        values = [(log.starts[0].step, flags_of[0].get(name))]
        for start, flags in zip(log.starts[1:], flags_of[1:], strict=True):
            if flags.get(name) != values[-1][1]:
                values.append((start.step, flags.get(name)))
        words = [setting(values[0][1]), *(f"from step {step:,}: {setting(value)}" for step, value in values[1:])]
        (changed if len(values) > 1 else same).append((name, "; ".join(words)))
    rows = [_setting(*each, "changed") for each in changed] + [_setting(*each, "same") for each in same]
    note = "A restart changed the settings in bold." if changed else ""
    return Section("Settings", f'<dl class="settings">{"".join(rows)}</dl>', note)


def _setting(name: str, value: str, kind: str) -> str:
    return f'<div class="{kind}"><dt>{text(name)}</dt><dd>{text(value)}</dd></div>'


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def facts(start: Start) -> dict[str, Any]:
    """Settings that are no flags, but may change from one start to the next."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in start.mesh.items())
    return {"mesh": mesh, "ranks": start.ranks, "device": start.device}
