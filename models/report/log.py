"""Reader of a run's log, `log.jsonl`: one JSON object per line, one line per event."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

State = Literal["running", "done", "stopped", "failed"]


class LogError(ValueError):
    """A log is missing, has no start line, or has a line that cannot be read."""


@dataclass(frozen=True)
class Event:
    """One line of the log.

    Attributes:
        step: number of optimizer steps done so far.
        time: Unix time in seconds.
    """

    step: int
    time: float


@dataclass(frozen=True)
class Start(Event):
    """A job started, or resumed from the checkpoint of `step`."""

    run: str = ""
    restart: bool = False  # whether the launcher restarted it, not a person
    job: dict[str, Any] = field(default_factory=dict)  # flag: value
    mesh: dict[str, int] = field(default_factory=dict)  # axis: size
    ranks: int | None = None
    device: str = ""
    parameters: int | None = None
    active_parameters: int | None = None
    train_bytes: int | None = None
    held_out_bytes: int | None = None
    train_tokens: int | None = None
    bytes_per_token: float = 1.0  # of the text to train on


@dataclass(frozen=True)
class Step(Event):
    """Training steps since the last such line. Lists have an entry for each MoE layer."""

    loss: float | None = None  # mean, in nats per byte or predicted token; None: all steps were skipped
    lr: float | None = None
    gradient_norm: float | None = None
    tokens_per_s: float | None = None
    tflops_per_s: float | None = None
    mfu: float | None = None
    memory_bytes: float | None = None
    sent_bytes: dict[str, float] = field(default_factory=dict)  # "axis collective": bytes per step, mean over ranks
    skipped: int = 0  # number of steps skipped since the start of the run
    dropped: list[float | None] = field(default_factory=list)  # share of assignments that capacity dropped
    imbalance: list[float | None] = field(default_factory=list)  # largest load of an expert over the mean
    tokens: list[list[int]] = field(default_factory=list)  # tokens of each expert; a float32 array once read

    def per_byte(self, bytes_per_token: float) -> Step:
        """The same event from one whose loss is per token, as the log has it."""
        return self if self.loss is None else replace(self, loss=self.loss / bytes_per_token)


@dataclass(frozen=True)
class HeldOut(Event):
    """An evaluation. `bytes` has, for each layer and expert, pairs (byte, tokens) of bytes that it gets most of."""

    bits_per_byte: float | None = None
    loss: float | None = None  # nats per predicted token, of masked or removed tokens
    accuracy: float | None = None  # share of these tokens with the highest logit
    bytes: list[list[list[tuple[int, int]]]] | None = None


@dataclass(frozen=True)
class Checkpoint(Event):
    """A checkpoint was written."""

    stall_s: float | None = None  # seconds that training waited
    seconds: float | None = None  # seconds until it was on the disk


@dataclass(frozen=True)
class Spike(Event):
    """A loss far above the median of the steps before."""

    loss: float | None = None  # nats per byte
    median: float | None = None  # nats per byte
    parameter: str = ""  # parameter of the largest gradient
    rank: int | None = None  # rank that has it

    def per_byte(self, bytes_per_token: float) -> Spike:
        """The same event from one whose losses are per token, as the log has it."""
        loss, median = (None if nats is None else nats / bytes_per_token for nats in (self.loss, self.median))
        return replace(self, loss=loss, median=median)


@dataclass(frozen=True)
class End(Event):
    """The job ended."""

    reason: str = ""  # "done", "stopped by ..." or the text of an error


@dataclass(frozen=True)
class Restart:
    """The job resumed after an end or a crash.

    Attributes:
        start: its start line.
        lost: number of steps that were done before and have to be repeated.
        idle: seconds since the line before.
        ended: reason of the last end. None if the job was killed before it could write one.
    """

    start: Start
    lost: int
    idle: float
    ended: str | None


@dataclass
class Log:
    """Events of a run, by kind. Steps that were repeated after a restart appear once."""

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
        """Flags of the newest start."""
        return self.starts[-1].job

    @property
    def unit(self) -> str:
        """Unit of the loss as the report shows it. Models of masked or removed tokens give a text no probability."""
        return "bits per byte" if self.job.get("objective", "clm") == "clm" else "nats per predicted token"

    @property
    def step(self) -> int:
        """Last step in the log."""
        return max(event.step for event in (*self.starts[-1:], *self.steps[-1:], *self.held_out[-1:]))

    @property
    def state(self) -> State:
        """State of the job. One that was killed counts as "running" until its restart: it wrote no end line."""
        if self.end is None:
            return "running"
        if self.end.reason == "done":
            return "done"
        return "stopped" if self.end.reason.startswith("stopped") else "failed"

    def add(self, event: Event) -> None:
        """Add the next event of the log."""
        kept = {Step: self.steps, HeldOut: self.held_out, Checkpoint: self.checkpoints, Spike: self.spikes}
        if isinstance(event, Start):
            self._start(event, list(kept.values()))
        elif isinstance(event, End):
            self.end = event
        else:
            if isinstance(event, Step | Spike) and self.starts and self.unit == "bits per byte":
                event = event.per_byte(self.starts[-1].bytes_per_token)
            kept[type(event)].append(event)
        self.time = event.time

    def _start(self, start: Start, kept: list[list]) -> None:
        """Begin an attempt, and drop events after the step that it resumes from."""
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
    """Path of a run's log, from the run's folder or the log itself."""
    return run / "log.jsonl" if run.is_dir() else run


def read(path: Path) -> Log:
    """Read the log at `path`.

    A crash may leave half a line, at the end or right before a start line. Such lines are skipped, and unknown events
    and keys as well.

    Raises:
        LogError: the file is missing or has no start line, or another line is broken. The message has the file and the
            line number.
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
        record = json.loads(line, parse_constant=lambda _: None)  # JSON has no NaN and Infinity
    except ValueError:  # also for bytes that are not UTF-8
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
        if name == "tokens":  # an array needs a tenth of the memory of a list of int
            value = [np.array(layer, np.float32) for layer in value or []]
        values[name] = value
    return kind(**values)


@cache
def _keys(kind: type[Event]) -> dict[str, tuple[Any, bool]]:
    """Type of each key of an event, and whether the key is optional."""
    hints = get_type_hints(kind)
    return {f.name: (hints[f.name], not (f.default is MISSING and f.default_factory is MISSING)) for f in fields(kind)}


PLAIN = {int: {int}, float: {int, float}, str: {str}, bool: {bool}, NoneType: {NoneType}}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value has this type. JSON has lists of fixed length for tuples."""
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
