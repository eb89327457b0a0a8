"""log.jsonl, the one log of a run: a JSON object a line, written as things happen. Keys: docs/guides/training.md."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TextIO

import launch
from meter import told


class Log:
    """Appends events to a file, on rank 0; other ranks write nothing.

    In `with`, an error that ends the job becomes the last line.

    Attributes:
        last: the newest event of each kind, those of the job that this one goes on from included.
    """

    def __init__(self, path: Path, place: launch.Place) -> None:
        self.path, self.place = path, place
        self.last: dict[str, dict[str, Any]] = {}
        self._file: TextIO | None = None  # opened by the first event

    def write(self, event: str, step: int, **values: Any) -> dict[str, Any]:
        """Append an event at once, and return it; NaN and infinity become null.

        A line that cannot be written is no reason to end a job: it says so, and the next event tries again.
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
            return  # it failed before it began, and the file may be another run's
        if error is not None:
            self.write("end", self.place.step, reason=f"{self.place}: {type(error).__name__}: {error}")
        with suppress(OSError):  # that has been said
            self._file.close()

    def _open(self, step: int) -> TextIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.read_text() if self.path.exists() else ""
        self.last = {each["event"]: each for each in parsed(before) if each["step"] <= step} | self.last
        self._file = open(self.path, "a")  # noqa: SIM115  as long as the job
        if before and not before.endswith("\n"):  # torn by a crash
            self._file.write("\n")
        return self._file


@dataclass
class Recent:
    """What there is to say in the next step event. A checkpoint holds it, so that a resumed run writes the same line.

    Attributes:
        losses: of the steps since the last event, those that were skipped excepted.
        tokens: of each MoE layer, tokens per expert in these steps, over all ranks; [] before the first.
        dropped: of each MoE layer, the assignments among them that capacity dropped.
        skipped: steps skipped in the whole run.
    """

    losses: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    skipped: int = 0

    def take(self, loss: float, skipped: int) -> None:
        """Note the loss of a step, and how many steps were skipped so far: this one, if there are more than before."""
        if skipped == self.skipped:
            self.losses.append(loss)
        self.skipped = skipped

    def count(self, tokens: list[list[int]], dropped: list[int]) -> None:
        """Add loads, as `steps.gather` returns them."""
        if self.tokens:
            tokens = [[a + b for a, b in zip(*both, strict=True)] for both in zip(self.tokens, tokens, strict=True)]
            dropped = [a + b for a, b in zip(self.dropped, dropped, strict=True)]
        self.tokens, self.dropped = tokens, dropped

    def spend(self) -> dict[str, Any]:
        """All of it, for a step event; then begin anew."""
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
    """The events of a log that count: work that was lost, and done again later, is left out."""
    return parsed(path.read_text()) if path.exists() else []


def parsed(text: str) -> list[dict[str, Any]]:
    """`read`, of a log's text."""
    events: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # torn by a crash
        if event["event"] == "start":
            events = [earlier for earlier in events if earlier["step"] <= event["step"]]
        events.append(event)
    return events


def summary(step: dict[str, Any]) -> str:
    """A step event in words."""
    words = ["no loss" if step["loss"] is None else f"loss {step['loss']:.3f}", told(step)]
    if step["tokens"]:
        words.append(f"dropped {mean(step['dropped']):.1%}, imbalance {max(step['imbalance']):.2f}")
    return ", ".join([*words, *([f"skipped {step['skipped']}"] if step["skipped"] else [])])


def mean(numbers: list[float]) -> float:
    """0 without any: a dense model has no layer of experts."""
    return sum(numbers) / max(1, len(numbers))


def finite(value: Any) -> Any:
    """A value of JSON, with null for NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
