"""Results of `autotune`: a table to read, and a JSON file, so that each machine is measured only once."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

from ...cuda import tiles, tune
from ...cuda.tiles import Blocks, Product
from ...cuda.tune import Shape

log = logging.getLogger(__name__)
Name = TypeVar("Name", bound=Hashable)
Row = TypeVar("Row", Shape, Product, Blocks)
Times = dict[Name, float | str]  # milliseconds of each run, or its error
Machine = dict[str, str]


def fastest(times: Times[Name]) -> Name | None:
    """The run with the shortest time, the first among equals, or None if all failed.

    >>> fastest({"torch": 1.5, "triton": 1.25, "other": "OutOfMemoryError: 3 GiB"})
    'triton'
    """
    ran = {name: ms for name, ms in times.items() if isinstance(ms, float)}
    return min(ran, key=ran.__getitem__) if ran else None


@dataclass(frozen=True)
class Tuned:
    """Measurements for experts of one shape.

    Attributes:
        shape: sizes of the experts on one rank.
        times: milliseconds of forward and backward with "torch" and with "triton", or the error of a run. Empty if
            nothing was measured.
        tiles: milliseconds of each matrix product of "triton" with each tile size, or the error of a run.
        why: reason why nothing was measured, or "".
    """

    shape: Shape
    times: Times[str] = field(default_factory=dict)
    tiles: dict[Product, Times[Blocks]] = field(default_factory=dict)
    why: str = ""

    @property
    def kernel(self) -> str:
        """The faster kernel, or "torch" if no run succeeded."""
        return fastest(self.times) or "torch"


@dataclass(frozen=True)
class Tuning:
    """Result of `autotune`: a `Tuned` for each shape of experts. `print` shows it as a table.

    Attributes:
        experts: measurements and choice for each shape.
    """

    experts: tuple[Tuned, ...]

    def __str__(self) -> str:
        lines = ["| T, D, H, L, k | experts | torch ms | triton ms | kernel | |", "|---|---|---|---|---|---|"]
        for tuned in self.experts:
            times = [tuned.times.get(kernel, "") for kernel in ("torch", "triton")]
            ms = " | ".join(f"{t:.3f}" if isinstance(t, float) else "failed" if t else "" for t in times)
            why = tuned.why or "; ".join(t for t in times if t and isinstance(t, str))
            what = f"{tuned.shape.activation}, {tuned.shape.dtype}"
            lines.append(f"| {', '.join(map(str, tuned.shape[:5]))} | {what} | {ms} | {tuned.kernel} | {why} |")
        return "\n".join(lines)


def machine(device: torch.device) -> Machine:
    """The things that times depend on: the GPU, versions, and a hash of the kernels' source."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    digest = blake2b(digest_size=6)
    for source in sorted(Path(tune.__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    name = tiles.device_name(device)
    return {"device": name, "torch": torch.__version__, "triton": triton, "kernels": digest.hexdigest()}


def write(path: Path, of: Machine, experts: Iterable[Tuned]) -> None:
    """Write measurements as JSON. The file is replaced in one step, so that a killed job leaves no half of it."""
    listed = [
        {
            "shape": tuned.shape._asdict(),
            "times": tuned.times,
            "tiles": [
                {"product": product._asdict(), "times": list(times.items())} for product, times in tuned.tiles.items()
            ],
        }
        for tuned in experts
    ]
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps({"machine": of, "experts": listed}, indent=1) + "\n")
    new.replace(path)


def read(path: Path, of: Machine) -> list[Tuned]:
    """Read a file of `write`. It gives nothing if there is no file, or if another machine was measured.

    Raises:
        ValueError: the file has other content.
    """
    if not path.exists():
        return []
    try:
        given = json.loads(path.read_text())
        there = dict(given["machine"])
        found = [
            Tuned(
                _checked(Shape, tuned["shape"]),
                {_of(str, kernel): _time(t) for kernel, t in tuned["times"].items()},
                {_checked(Product, each["product"]): _times(each["times"]) for each in tuned["tiles"]},
            )
            for tuned in given["experts"]
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a file of autotune ({type(error).__name__}: {error}): remove it, or name another file"
        ) from None
    if there == of:
        return found
    differ = ", ".join(f"{key} {there.get(key)}, not {now}" for key, now in of.items() if there.get(key) != now)
    log.warning("%s was measured with %s: measuring again", path, differ)
    return []


def _times(listed: list) -> Times[Blocks]:
    return {_checked(Blocks, dict(zip(Blocks._fields, size, strict=True))): _time(t) for size, t in listed}


def _time(value: Any) -> float | str:
    """Check that a value is milliseconds, or the error of a run."""
    if isinstance(value, str) or (isinstance(value, float) and 0 <= value < math.inf):
        return value
    raise ValueError(f"{value!r} is neither milliseconds nor an error")


def _checked(kind: type[Row], values: dict[str, Any]) -> Row:
    """Build the named tuple `kind`, and check that all fields have their annotated types and numbers are positive."""
    kinds = get_type_hints(kind)
    if values.keys() != kinds.keys():
        raise ValueError(f"{kind.__name__} has the fields {', '.join(kinds)}; got {', '.join(values)}")
    return kind(**{name: _of(kinds[name], value) for name, value in values.items()})


def _of(kind: Any, value: Any) -> Any:
    if kind == tuple[int, int] and isinstance(value, list) and len(value) == 2:
        return tuple(_of(int, each) for each in value)
    if type(value) is kind and (not isinstance(value, int) or value > 0 or kind is bool):
        return value
    raise ValueError(f"{value!r} is not a {'positive int' if kind is int else getattr(kind, '__name__', kind)}")
