"""Parser of all examples; and flags of a dataclass, from the command line and from a TOML file (`--config`)."""

from __future__ import annotations

import argparse
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import launch


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def at_least(number: int, flags: argparse.Namespace, *names: str) -> None:
    """Raise a ValueError for the first of the named flags that is below 0 or 1, the `number`."""
    for name in names:
        if (value := getattr(flags, name)) < number:
            raise ValueError(f"{flag(name)} must be {'positive' if number else '0 or more'}; got {value}")


class Parser(argparse.ArgumentParser):
    """Parser of a script on many ranks. Its help shows the text `about` and defaults, and rank 0 alone prints it."""

    def __init__(self, about: str | None) -> None:
        super().__init__(description=about, formatter_class=Help, allow_abbrev=False)

    def print_help(self, file: Any = None) -> None:
        """Print the help, on rank 0."""
        if launch.RANK == 0:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        """Raise the error of a wrong command line, where argparse would print its usage on each rank."""
        raise ValueError(f"{message}; --help lists all flags")


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that adds a flag's default, unless it says it already or is off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False or action.default in (argparse.SUPPRESS, [])
        return action.help if none or "default" in (action.help or "") else f"{action.help} (default: %(default)s)"


def given(
    job: Any, choices: dict[str, tuple[str, ...]], argv: list[str] | None = None, about: str | None = None
) -> dict[str, Any]:
    """Values of a dataclass's fields from a command line (None: this process's), and from the file of its --config.

    Args:
        job: dataclass whose fields are ``Annotated[kind, meaning]``, with defaults.
        choices: allowed values of some fields, by name, for the help text.
        argv: the command line.
        about: text above the help.

    Raises:
        ValueError: an unknown flag or a value of the wrong type, on the command line or in the file.
    """
    parser = Parser(about)
    parser.add_argument("--config", type=Path, help="TOML file of these flags, as in micro-batches = 8 (default: none)")
    kinds = get_type_hints(job, include_extras=True)
    for f in fields(job):
        kind, meaning = get_args(kinds[f.name])
        shown = meaning
        if f.name in choices:
            shown = f"{shown}: {', '.join(filter(None, choices[f.name]))}"
        if f.name != "data":
            shown = f"{shown} (default: {'no' if kind is bool else f.default or 'none' if kind is str else f.default})"
        how: dict[str, Any] = {"type": kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif kind == tuple[str, ...]:
            how = {"nargs": "+"}
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=shown, **how)
    values = vars(parser.parse_args(argv))
    file = values.pop("config")
    values = (read(file, get_type_hints(job)) if file else {}) | values
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def read(file: Path, kinds: dict[str, Any]) -> dict[str, Any]:
    """Flags of a TOML file, by the names of fields, whose types are `kinds`."""
    try:
        values = {name.replace("-", "_"): value for name, value in tomllib.loads(file.read_text()).items()}
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--config {file}: {error}") from None
    if unknown := sorted(values.keys() - kinds.keys()):
        raise ValueError(
            f"--config {file}: unknown {', '.join(unknown)}; the keys are the flags, {', '.join(sorted(kinds))}"
        )
    for name, value in values.items():
        kind = kinds[name]
        wanted = {float: (float, int), tuple[str, ...]: (list,)}.get(kind, (kind,))
        if type(value) not in wanted:
            raise ValueError(f"--config {file}: {name} is {getattr(kind, '__name__', kind)}; got {value!r}")
    return values


def divides(what: str, whole: int, by: str, part: int) -> None:
    """Raise a ValueError if `whole` is no multiple of `part`."""
    if whole % part:
        raise ValueError(f"{what} ({whole}) must be a multiple of {part} = {by}")
