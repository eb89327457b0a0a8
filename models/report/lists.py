"""What happened to the run, and its settings, as tables."""

from __future__ import annotations

import statistics
from typing import Any

from .curves import Series
from .log import Log, Start
from .panels import bits, drawn, grid
from .parts import details, duration, moment, number, section, setting, table, text

MOST = 200  # rows of a table


def events(log: Log) -> str:
    """Restarts, spikes, skipped steps and checkpoints; "" if there were none."""
    html = "\n".join(filter(None, (restarts(log), spikes(log), skipped(log), checkpoints(log))))
    return section("Events", html) if html else ""


def restarts(log: Log) -> str:
    """Each time the job went on."""
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
    return _folded("restart", head, rows, numbers=("from step", "steps done again"), is_open=True)


def spikes(log: Log) -> str:
    """Losses far above the median."""
    rows = [
        (f"{each.step:,}", number(bits(each.loss)), number(bits(each.median)), each.parameter, number(each.rank))
        for each in log.spikes
    ]
    head = ("step", "bits per byte", "median before", "largest gradient", "rank")
    return _folded("spike", head, rows, numbers=head[:3])


def skipped(log: Log) -> str:
    """Where steps were left out."""
    rows, before, count = [], 0, 0
    for step in log.steps:
        if step.skipped > count:
            rows.append((f"{before + 1:,} to {step.step:,}", f"{step.skipped - count:,}"))
        before, count = step.step, step.skipped
    return _folded("range of steps with skipped ones", ("steps", "skipped"), rows, numbers=("skipped",))


def checkpoints(log: Log) -> str:
    """Checkpoints and how long training stood still for them."""
    if not log.checkpoints:
        return ""
    stalls = [each.stall_s for each in log.checkpoints if each.stall_s is not None]
    rows = [
        (f"{each.step:,}", moment(each.time), number(each.stall_s, ".2f"), number(each.seconds, ".2f"))
        for each in log.checkpoints
    ]
    head = ("step", "time", "seconds that training stood still", "seconds until on the disk")
    listed = _folded("checkpoint", head, rows, numbers=(head[0], *head[2:]))
    if not stalls:
        return listed
    note = f"median {statistics.median(stalls):.2f} s, longest {max(stalls):.2f} s"
    series = Series(
        "", [each.step for each in log.checkpoints], [each.stall_s for each in log.checkpoints], kind="bars"
    )
    return listed + grid(drawn(log, "Checkpoints: seconds that training stood still", series, note=note))


def _folded(what: str, head: tuple[str, ...], rows: list, numbers: tuple[str, ...], is_open: bool = False) -> str:
    """A table under its number of rows; only the newest of very many."""
    if not rows:
        return ""
    title = f"{len(rows):,} {what}{'s' if len(rows) > 1 else ''}"
    if len(rows) > MOST:
        title += f", the newest {MOST} of them"
    return details(title, table(head, rows[-MOST:], numbers), is_open)


def settings(log: Log) -> str:
    """All flags; those that a restart changed come first, with their values."""
    told = [{**start.job, **facts(start)} for start in log.starts]
    changed, same = [], []
    for name in dict.fromkeys(name for values in reversed(told) for name in values):
        values = [(log.starts[0].step, told[0].get(name))]
        for start, flags in zip(log.starts[1:], told[1:], strict=True):
            if flags.get(name) != values[-1][1]:
                values.append((start.step, flags.get(name)))
        words = [setting(values[0][1]), *(f"from step {step:,}: {setting(value)}" for step, value in values[1:])]
        (changed if len(values) > 1 else same).append((name, "; ".join(words)))
    rows = [_setting(*each, "changed") for each in changed] + [_setting(*each, "same") for each in same]
    note = "A restart changed those in colour." if changed else ""
    return section("Settings", f'<dl class="settings">{"".join(rows)}</dl>', note)


def _setting(name: str, value: str, kind: str) -> str:
    return f'<div class="{kind}"><dt>{text(name)}</dt><dd>{text(value)}</dd></div>'


def facts(start: Start) -> dict[str, Any]:
    """What is no flag, but may change from one start to the next."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in start.mesh.items())
    return {"(mesh)": mesh, "(ranks)": start.ranks, "(device)": start.device}
