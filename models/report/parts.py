"""Pieces of HTML, and numbers in words. Arguments are text, which is escaped here, unless their name says `html`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from typing import Any

NONE = "—"  # for a missing value


def text(value: object) -> str:
    """Escape any value for HTML."""
    return escape(str(value))


@dataclass(frozen=True)
class Section:
    """Section of the page, with a heading."""

    title: str
    html: str
    note: str = ""

    @property
    def name(self) -> str:
        """Anchor of the section."""
        return self.title.lower().replace(" ", "-")

    def __str__(self) -> str:
        note = f'<p class="note">{text(self.note)}</p>\n' if self.note else ""
        return f'<section id="{text(self.name)}">\n<h2>{text(self.title)}</h2>\n{note}{self.html}\n</section>'


def tile(label: str, value: str, note: str = "") -> str:
    """HTML of a number in the headline."""
    return f'<div class="tile"><dt>{text(label)}</dt><dd>{text(value)}<small>{text(note)}</small></dd></div>'


def panel(title: str, html: str, legend: Iterable[tuple[str, str]] = (), note: str = "") -> str:
    """HTML of a chart with its title. The legend has pairs (colour, name)."""
    keys = "".join(f'<span class="key {text(colour)}">{text(name)}</span>' for colour, name in legend)
    said = f"<small>{text(note)}</small>" if note else ""
    return f'<figure class="panel"><figcaption><b>{text(title)}</b>{keys}{said}</figcaption>{html}</figure>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[str] = ()) -> str:
    """HTML of a table. The columns in `numbers` are aligned to the right."""
    sides = [' class="number"' if name in numbers else "" for name in head]
    top = "".join(f"<th{side}>{text(name)}</th>" for name, side in zip(head, sides, strict=True))
    label = [f' data-label="{text(name)}"' for name in head]  # narrow windows show a row's cells below each other
    body = "\n".join(
        "<tr>" + "".join(f"<td{a}{b}>{text(c)}</td>" for a, b, c in zip(sides, label, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="table"><table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def details(summary: str, html: str, is_open: bool = False) -> str:
    """HTML of a part that a click unfolds."""
    return f"<details{' open' if is_open else ''}><summary>{text(summary)}</summary>\n{html}\n</details>"


def number(value: float | None, form: str = ",.4g") -> str:
    """Format a number, or a dash if it is missing."""
    return NONE if value is None else format(value, form)


def large(value: float | None, unit: str = "") -> str:
    """Format a number with three digits and a prefix, as in 12.3 M."""
    if value is None:
        return NONE
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Format a duration in its two largest units, as in 2 h 13 min."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    left, said = round(seconds), []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if left >= size or said:
            said.append(f"{left // size} {unit}")
            left %= size
        if len(said) == 2:
            break
    return " ".join(said)


def moment(time: float) -> str:
    """Format a Unix time to the minute, in UTC."""
    try:
        return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):  # out of the range of dates
        return f"{time:g}"


def setting(value: Any) -> str:
    """Format the value of a flag."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "" or value == []:
        return NONE
    return ", ".join(map(setting, value)) if isinstance(value, list) else str(value)


def printable(byte: int) -> str:
    """Format a byte as one character if it has one, otherwise in hex."""
    signs = {9: "⇥", 10: "⏎", 32: "␣"}
    if byte in signs or 32 < byte < 127:
        return signs.get(byte) or chr(byte)
    return f"{byte:02x}" if byte < 256 else f"<{byte}>"
