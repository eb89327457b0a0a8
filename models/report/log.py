"""Reads `log.jsonl`, the log of a run: one JSON object a line, appended as things happen."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

State = Literal["running", "done", "stopped", "failed"]


class LogError(ValueError):
    """A log that is not there, has no start line, or has a line that cannot be read."""


@dataclass(frozen=True)
class Event:
    """A line of the log.

    Attributes:
        step: optimizer steps done by then.
        time: Unix time in seconds.
    """

    step: int
    time: float


@dataclass(frozen=True)
class Start(Event):
    """A job began, or went on from the checkpoint of `step`."""

    run: str = ""
    restart: bool = False  # by the launcher, not by a person
    job: dict[str, Any] = field(default_factory=dict)  # value of each flag
    mesh: dict[str, int] = field(default_factory=dict)  # size of each axis
    ranks: int | None = None
    device: str = ""
    parameters: int | None = None
    active_parameters: int | None = None
    train_bytes: int | None = None
    held_out_bytes: int | None = None


@dataclass(frozen=True)
class Step(Event):
    """The steps since the line before. Lists have an entry for each MoE layer."""

    loss: float | None = None  # nats per byte, mean; None: all steps were skipped
    lr: float | None = None
    gradient_norm: float | None = None
    tokens_per_s: float | None = None
    tflops_per_s: float | None = None
    mfu: float | None = None
    memory_bytes: float | None = None
    sent_bytes: dict[str, float] = field(default_factory=dict)  # "axis collective": in one step, mean over ranks
    skipped: int = 0  # steps skipped so far
    dropped: list[float | None] = field(default_factory=list)  # share of the assignments
    imbalance: list[float | None] = field(default_factory=list)  # largest load of an expert over the mean
    tokens: list[list[int]] = field(default_factory=list)  # of each expert; float32 arrays once read


@dataclass(frozen=True)
class HeldOut(Event):
    """An evaluation. `bytes` are, for each layer and expert, (byte, tokens): the bytes that it takes above its part."""

    bits_per_byte: float | None = None
    bytes: list[list[list[tuple[int, int]]]] | None = None


@dataclass(frozen=True)
class Checkpoint(Event):
    """A checkpoint: seconds that training stood still, and seconds until it was on the disk."""

    stall_s: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Spike(Event):
    """A loss, in nats per byte, far above the median of the steps before; where the largest gradient was."""

    loss: float | None = None
    median: float | None = None
    parameter: str = ""
    rank: int | None = None


@dataclass(frozen=True)
class End(Event):
    """The job ended: "done", "stopped by ..." or the text of an error."""

    reason: str = ""


@dataclass(frozen=True)
class Restart:
    """The job went on.

    Attributes:
        start: its line.
        lost: steps done before it that had to be done again.
        idle: seconds since the line before.
        ended: why the job had ended; None: it was killed before it could say so.
    """

    start: Start
    lost: int
    idle: float
    ended: str | None


@dataclass
class Log:
    """What counts of a log: steps that were lost and done again appear once."""

    path: Path
    starts: list[Start] = field(default_factory=list)
    restarts: list[Restart] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    held_out: list[HeldOut] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    spikes: list[Spike] = field(default_factory=list)
    end: End | None = None
    time: float = 0.0  # of the last line

    @property
    def job(self) -> dict[str, Any]:
        """Flags in force now."""
        return self.starts[-1].job

    @property
    def step(self) -> int:
        """The last step that the log knows of."""
        return max(event.step for event in (*self.starts[-1:], *self.steps[-1:], *self.held_out[-1:]))

    @property
    def state(self) -> State:
        """A job that was killed could not say so: it is "running" until its restart."""
        if self.end is None:
            return "running"
        if self.end.reason == "done":
            return "done"
        return "stopped" if self.end.reason.startswith("stopped") else "failed"

    def add(self, event: Event) -> None:
        """Take the next line."""
        kept = {Step: self.steps, HeldOut: self.held_out, Checkpoint: self.checkpoints, Spike: self.spikes}
        if isinstance(event, Start):
            self._start(event, list(kept.values()))
        elif isinstance(event, End):
            self.end = event
        else:
            kept[type(event)].append(event)
        self.time = event.time

    def _start(self, start: Start, kept: list[list]) -> None:
        """Work after the step that the job goes on from was lost."""
        if self.starts:
            reached = max([start.step, *(events[-1].step for events in kept if events)])
            ended = self.end.reason if self.end else None
            self.restarts.append(Restart(start, reached - start.step, start.time - self.time, ended))
        for events in kept:
            events[:] = [event for event in events if event.step <= start.step]
        self.starts.append(start)
        self.end = None


EVENTS = {
    "start": Start,
    "step": Step,
    "held out": HeldOut,
    "checkpoint": Checkpoint,
    "spike": Spike,
    "end": End,
}


def path_of(run: Path) -> Path:
    """The log of a run: a file in its folder, or that file."""
    return run / "log.jsonl" if run.is_dir() else run


def read(path: Path) -> Log:
    """The log at `path`.

    A line that a crash tore is passed over: the last one, or one right before a start line. Unknown events and keys are
    passed over as well.

    Raises:
        LogError: there is no such file, it has no start line, or another line than those is broken. The message has
            the file and the line number.
    """
    log, torn = Log(path), None
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                place = f"{path}, line {number}"
                record = _record(line)
                if torn and (record is None or record.get("event") != "start"):
                    raise LogError(torn)
                torn = None if record is not None else f"{place}: this is not a JSON object: {_shown(line)}"
                kind = EVENTS.get(str(record.get("event"))) if record else None
                if record and kind:
                    log.add(_event(kind, record, place))
    except OSError as error:
        raise LogError(f"{path} cannot be read: {error.strerror}. Give the folder of a run, or its log.jsonl") from None
    if not log.starts:
        raise LogError(f"{path} has no line with the event start: no job has begun there, or it is another kind of log")
    return log


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line, parse_constant=lambda _: None)  # NaN and Infinity are no JSON
    except ValueError:  # not UTF-8 among them
        return None
    return record if isinstance(record, dict) else None


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= 60 else text[:60] + " ...")


E = TypeVar("E", bound=Event)


def _event(kind: type[E], record: dict[str, Any], place: str) -> E:
    values = {}
    for name, (hint, optional) in _keys(kind).items():
        value = record.get(name)
        if value is None and optional:
            continue
        if not _fits(value, hint):
            got = "it is not there" if name not in record else f"got {_shown(json.dumps(value).encode())}"
            wanted = getattr(hint, "__name__", hint) if get_origin(hint) is None else hint
            raise LogError(f"{place}: {name!r} of the event {record['event']!r} must be {wanted}; {got}")
        if name == "tokens":  # a tenth of the memory that a list of int takes
            value = [np.array(layer, np.float32) for layer in value or []]
        values[name] = value
    return kind(**values)


@cache
def _keys(kind: type[Event]) -> dict[str, tuple[Any, bool]]:
    """Type of each key, and whether it may be left out."""
    hints = get_type_hints(kind)
    return {f.name: (hints[f.name], not (f.default is MISSING and f.default_factory is MISSING)) for f in fields(kind)}


PLAIN = {int: {int}, float: {int, float}, str: {str}, bool: {bool}, NoneType: {NoneType}}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON has this type; tuples are lists of fixed length there."""
    if hint in PLAIN:
        return type(value) in PLAIN[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_fits(value, each) for each in inner)
    if origin is list and isinstance(value, list):
        if inner[0] in PLAIN:
            return set(map(type, value)) <= PLAIN[inner[0]]
        return all(_fits(each, inner[0]) for each in value)
    if origin is tuple and isinstance(value, list):
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if origin is dict and isinstance(value, dict):
        return inner[1] is Any or all(_fits(each, inner[1]) for each in value.values())
    return False
