"""Writer of a run's log, log.jsonl: one JSON object per line. Its keys are in docs/guides/training.md."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TextIO

import launch
from meter import usage_line


class Log:
    """Appends events to a file, on rank 0. Other ranks write nothing.

    Used in `with`, it writes an error that ends the job as the last line.

    Attributes:
        last: newest event of each kind, including events of the job that this one resumes.
    """

    def __init__(self, path: Path, place: launch.Place) -> None:
        self.path, self.place = path, place
        self.last: dict[str, dict[str, Any]] = {}
        self._file: TextIO | None = None  # opened by the first event

    def write(self, event: str, step: int, **values: Any) -> dict[str, Any]:
        """Append an event at once, and return it. NaN and infinity become null.

        If the line cannot be written, the job reports that and goes on.
        """
        line = {"event": event, "step": step, "time": time.time(), **finite(values)}
        if launch.RANK == 0:
            try:
                file = self._open(step) if self._file is None else self._file
                file.write(json.dumps(line) + "\n")
                file.flush()
            except OSError as error:
                launch.say(f"{self.path} was not written: {error}")
        self.last[event] = line
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._file is None:
            return  # nothing was logged yet, and the file may belong to another run
        if error is not None:
            self.write("end", self.place.step, reason=f"{self.place}: {type(error).__name__}: {error}")
        with suppress(OSError):  # `write` has reported it
            self._file.close()

    def _open(self, step: int) -> TextIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.read_text() if self.path.exists() else ""
        self.last = {each["event"]: each for each in parsed(before) if each["step"] <= step} | self.last
        self._file = open(self.path, "a")  # noqa: SIM115  as long as the job
        if before and not before.endswith("\n"):  # a crash left half a line
            self._file.write("\n")
        return self._file


@dataclass
class Recent:
    """Values for the next step event. Checkpoints save them, so that a resumed run writes the same line.

    Attributes:
        losses: losses since the last event, without skipped steps.
        tokens: tokens per expert of each MoE layer since the last event, over all ranks; [] before the first count.
        dropped: assignments of each MoE layer that capacity dropped since the last event.
        skipped: number of steps skipped in the whole run.
    """

    losses: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    skipped: int = 0

    def take(self, loss: float, skipped: int) -> None:
        """Add the loss of a step, unless `skipped`, the number of skipped steps so far, has grown."""
        if skipped == self.skipped:
            self.losses.append(loss)
        self.skipped = skipped

    def count(self, tokens: list[list[int]], dropped: list[int]) -> None:
        """Add tokens per expert and dropped assignments, as `steps.gather` returns them."""
        if self.tokens:
            tokens = [[a + b for a, b in zip(*both, strict=True)] for both in zip(self.tokens, tokens, strict=True)]
            dropped = [a + b for a, b in zip(self.dropped, dropped, strict=True)]
        self.tokens, self.dropped = tokens, dropped

    def spend(self) -> dict[str, Any]:
        """Return the values for a step event, and start again from zero."""
        sums = [max(1, sum(layer)) for layer in self.tokens]
        values = {
            "loss": sum(self.losses) / len(self.losses) if self.losses else None,
            "skipped": self.skipped,
            "dropped": [n / whole for n, whole in zip(self.dropped, sums, strict=True)],
            "imbalance": [max(layer) * len(layer) / n for layer, n in zip(self.tokens, sums, strict=True)],
            "tokens": self.tokens,
        }
        self.losses, self.tokens, self.dropped = [], [], []
        return values


def read(path: Path) -> list[dict[str, Any]]:
    """Events of a log, without steps that were lost and repeated later."""
    return parsed(path.read_text()) if path.exists() else []


def parsed(text: str) -> list[dict[str, Any]]:
    """Events in a log's text, as `read` returns them."""
    events: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # half a line, left by a crash
        if event["event"] == "start":
            events = [earlier for earlier in events if earlier["step"] <= event["step"]]
        events.append(event)
    return events


def summary(step: dict[str, Any]) -> str:
    """One line of text for a step event."""
    words = ["no loss" if step["loss"] is None else f"loss {step['loss']:.3f}", usage_line(step)]
    if step["tokens"]:
        words.append(f"dropped {mean(step['dropped']):.1%}, imbalance {max(step['imbalance']):.2f}")
    return ", ".join([*words, *([f"skipped {step['skipped']}"] if step["skipped"] else [])])


def mean(numbers: list[float]) -> float:
    """Mean of numbers; 0 of none, since a dense model has no MoE layers."""
    return sum(numbers) / max(1, len(numbers))


def finite(value: Any) -> Any:
    """Value for JSON, with None for NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
