"""Checkpoints saved and loaded at once: folders step-N, complete or not at all."""

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
    """What a checkpoint holds besides the state of model and optimizer."""

    step: int
    extra: dict[str, Any]
    rank_state: Any  # this rank's; None if the number of ranks is another


def save(
    folder: PathLike, model: Model, optimizer: Optimizer, step: int, extra: dict | None = None, rank_state: Any = None
) -> Path:
    """Write model, optimizer, `extra` (what JSON can say) and `rank_state` to folder/step-N; returns that path.

    All ranks write to one folder, on a file system that they share. `extra` is rank 0's, and that of others is ignored.
    `rank_state` is this rank's own, such as its random states: tensors and plain Python values. Until all is on the
    disk the name is step-N.incomplete; what a crash left under such names is removed. A damaged step-N that is in the
    way becomes step-N.damaged.

    Raises:
        WriteError: on every rank, if the disk of one is full or at fault.
        CheckpointError: on every rank, if one has a parameter or optimizer state with NaN or infinity, or another
            folder than rank 0; or if step-N exists already. Other checkpoints are left alone.
    """
    snapshot = Snapshot.of(Path(folder), step, model, optimizer, extra, rank_state)
    snapshot.write()
    return snapshot.path


def newest(folder: PathLike) -> Path | None:
    """The complete checkpoint of most steps in a folder, damaged or not, as this rank sees it; None without any."""
    return next(iter(_complete(Path(folder))), None)


def described(path: PathLike) -> tuple[int, dict[str, Any]]:
    """The step of a checkpoint, and the `extra` that it was saved with: what a model is built from. All ranks call it.

    Raises:
        DamagedError, CheckpointError: as for `load`.
    """
    _, reader = verify(Path(path))
    return _described(Path(path), reader)


def load(path: PathLike, model: Model, optimizer: Optimizer, accept: Accept | None = None) -> Loaded:
    """Read a checkpoint into a model and an optimizer, on any mesh; the model's gradients are dropped.

    It may come from anyone: no code in it is run, and no file outside of it is read. A parameter for which it has no
    optimizer state, as it had no gradient yet or was frozen, is as fresh to the optimizer as it was then.

    Args:
        path: of the checkpoint.
        model, optimizer: as for `save`.
        accept: called on every rank with the checkpoint's step and `extra` before anything of it is loaded. It refuses
            the checkpoint by raising a CheckpointError.

    Raises:
        DamagedError: on every rank, if a file is not what was written, or holds more than tensors and plain values; or
            if a parameter or optimizer state has NaN or infinity.
        CheckpointError: on every rank, if it is of another model or optimizer, or cannot be read to its end. Unless
            the message says that a part was read, model and optimizer are as they were, after each of the errors.
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
    """Load the checkpoint of most steps that is not damaged; None if the folder has no checkpoint at all.

    Rank 0 logs a warning for each damaged one passed over, NaN or infinity being such damage; they stay where they are.
    `accept` is as for `load`.

    Raises:
        CheckpointError: on every rank, if all are damaged, or the first intact one is of another model.
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
    """Delete all but the `keep` checkpoints of most steps and the newest sound one.

    Rank 0 deletes, and the others do not wait for it. What it cannot delete it logs.

    Args:
        folder: of the checkpoints.
        keep: how many stay; positive.
        sound: one that stays, known to be sound since `save` has just returned it. None: all ranks share the reading of
            the newest ones to find one.
        group: a group of all ranks; None: the default group.
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
    """Most steps first."""
    steps = {int(m[1]): path for path in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def _read_own(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DamagedError(
            f"{file} holds more than tensors and plain values; it may be code, and was not run"
        ) from None
