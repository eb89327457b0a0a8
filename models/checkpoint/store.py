"""Save, load and prune checkpoints: folders step-N, each complete or not there."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from .contents import Contents, Model
from .plain_files import PlainReader, read_values
from .snapshot import Snapshot
from .together import CheckpointError, DamagedError, on_first, place, together
from .verify import is_sound, verify

Accept = Callable[[int, dict[str, Any]], None]
PathLike = str | os.PathLike[str]
_log = logging.getLogger(__package__)  # turnout.models.checkpoint


class Loaded(NamedTuple):
    """Contents of a checkpoint besides the state of model and optimizer."""

    step: int  # number of steps that were trained
    extra: dict[str, Any]  # as rank 0 saved it
    rank_state: Any  # as this rank saved it; None if the number of ranks has changed


def save(
    folder: PathLike, model: Model, optimizer: Optimizer, step: int, extra: dict | None = None, rank_state: Any = None
) -> Path:
    """Write a checkpoint to folder/step-N. All ranks call it.

    Until all of it is on the disk its name is step-N.incomplete. Earlier leftovers under such names are removed. If
    step-N exists but is damaged, it becomes step-N.damaged.

    Args:
        folder: path of the folder, the same on all ranks, on a file system that they share.
        model: module, or list of the pipeline stages that this rank runs.
        optimizer: optimizer of all their parameters.
        step: number of the step, N.
        extra: more values for JSON. Those of rank 0 are saved. None, the default, saves none.
        rank_state: this rank's own values, such as random states: tensors and plain Python values. None by default.

    Returns:
        Path of the checkpoint.

    Raises:
        WriteError: on every rank, if the disk of one is full or failing.
        CheckpointError: on every rank, if step-N exists already, if a parameter or optimizer state has NaN or
            infinity, or if a rank sees another folder than rank 0. Other checkpoints are untouched.
    """
    snapshot = Snapshot.of(Path(folder), step, model, optimizer, extra, rank_state)
    snapshot.write()
    return snapshot.path


def newest(folder: PathLike) -> Path | None:
    """Path of the complete checkpoint of most steps in a folder, or None. Damaged ones count; one rank may call it."""
    return next(iter(_complete(Path(folder))), None)


def described(path: PathLike) -> tuple[int, dict[str, Any]]:
    """The step of a checkpoint, and the `extra` that it was saved with: what a model is built from. All ranks call it.

    Raises:
        DamagedError, CheckpointError: as for `load`.
    """
    _, reader = verify(Path(path))
    return _described(Path(path), reader)


def load(path: PathLike, model: Model, optimizer: Optimizer, accept: Accept | None = None) -> Loaded:
    """Load a checkpoint into a model and an optimizer, on any mesh. All ranks call it.

    A checkpoint from a stranger is safe: no code in it runs, and no file outside it is read. Gradients are dropped. A
    parameter without optimizer state in the checkpoint has none afterwards.

    Args:
        path: path of the checkpoint.
        model: module, or list of the pipeline stages that this rank runs.
        optimizer: optimizer of all their parameters.
        accept: function (step, extra), called on every rank before anything is loaded. It refuses the checkpoint by
            raising a CheckpointError. None, the default, accepts all.

    Returns:
        Step, `extra` and this rank's state.

    Raises:
        DamagedError: on every rank, if a file differs from what was written, if it holds more than tensors and plain
            values, or if a parameter or optimizer state has NaN or infinity.
        CheckpointError: on every rank, if it belongs to another model or optimizer, or if reading fails. Model and
            optimizer are unchanged after an error, unless its message says that a part was read.
    """
    path = Path(path)
    (files, reader), own = verify(path), []
    rank, ranks = place()
    if {name for name in files if name.startswith("rank-")} == {f"rank-{each}.pt" for each in range(ranks)}:
        together(lambda: own.append(_read_own(path / f"rank-{rank}.pt")))
    step, extra = _described(path, reader)
    if accept:
        together(lambda: accept(step, extra))
    optimizer.zero_grad()  # the optimizer may make a step to get its state
    Contents(model, optimizer).read(reader)
    return Loaded(step, extra, own[0] if own else None)


def load_newest(folder: PathLike, model: Model, optimizer: Optimizer, accept: Accept | None = None) -> Loaded | None:
    """Load the checkpoint of most steps that is not damaged. All ranks call it.

    Rank 0 logs a warning for each damaged one that is skipped. NaN or infinity counts as damage. Damaged ones stay.

    Args:
        folder: path of the folder.
        model: module, or list of the pipeline stages that this rank runs.
        optimizer: optimizer of all their parameters.
        accept: function (step, extra) that may refuse a checkpoint, as for `load`.

    Returns:
        Step, `extra` and this rank's state. None if the folder has no checkpoint.

    Raises:
        CheckpointError: on every rank, if all are damaged, or if the first intact one belongs to another model.
    """
    folder, damaged = Path(folder), []
    for path in on_first(lambda: _complete(folder)):
        try:
            return load(path, model, optimizer, accept)
        except DamagedError as error:
            damaged.append(str(error))
            if place()[0] == 0:
                _log.warning("%s; trying the one before", error)
    if damaged:
        raise CheckpointError(f"no checkpoint in {folder} is intact: " + "; ".join(damaged))
    return None


def prune(folder: PathLike, keep: int, *, sound: Path | None = None, group: ProcessGroup | None = None) -> None:
    """Delete all checkpoints but the newest `keep`, and the newest intact one. All ranks call it.

    Rank 0 deletes, and the others do not wait for it. It logs a checkpoint that it cannot delete.

    Args:
        folder: path of the folder.
        keep: number of checkpoints that stay, positive.
        sound: path that `save` has just returned, which is then known to be intact and stays. None, the default, lets
            the ranks read the newest ones together until one is intact.
        group: group of all ranks. None, the default, is the default group.

    Raises:
        ValueError: `keep` is not positive.
    """
    if keep < 1:
        raise ValueError(f"keep must be positive; got {keep}")
    paths = on_first(lambda: _complete(Path(folder)), group)
    if len(paths) > keep and sound is None:
        sound = next((path for path in paths if is_sound(path, group)), None)
    kept = {path.name for path in (*paths[:keep], sound) if path}
    for path in paths if sound and place()[0] == 0 else []:
        try:
            if path.name not in kept:
                shutil.rmtree(path.rename(path.with_name(f"{path.name}.incomplete")))
        except OSError as error:
            _log.warning("%s is not deleted: %s", path, error)


def _described(path: Path, reader: PlainReader) -> tuple[int, dict[str, Any]]:
    try:
        said = read_values(reader, {"step": 0, "extra": ""})
    except CheckpointError as error:
        raise type(error)(f"{path} does not load: {error}") from None
    return said["step"], json.loads(said["extra"])


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, most steps first."""
    steps = {int(m[1]): path for path in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def _read_own(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DamagedError(
            f"{file} holds more than tensors and plain values; it may be code, and was not run"
        ) from None
