"""Checkpoints that any number of ranks can read, and that are read whole or not at all.

torch.distributed.checkpoint keeps the contents. What is spread over ranks are DTensors, experts in global order, and
what stages of a pipeline hold goes by the names of the whole model: a checkpoint of one mesh loads on any other.
The rest is the same on every rank and saved once. A checkpoint is written under another name, with the checksum of
each file, and renamed when all of it has reached the disk. What fails on one rank is raised on all of them; so all
ranks call each function here, `newest` excepted. One process needs no process group.

`model` is a module, or the stages of a pipeline that this rank runs, in a list (`ParallelModel.parts`). One optimizer
has the parameters of all of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from .contents import Contents, Model
from .plain_files import METADATA, PlainReader, plain_bytes, read_values
from .together import CheckpointError, DamagedError, full_disk_named, on_first, place, together

Accept = Callable[[int, dict[str, Any]], None]
_Path = str | os.PathLike[str]
_Files = dict[str, dict[str, Any]]  # name: {"size": bytes, "sha256": hexadecimal}
_log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """What a checkpoint holds besides the state of model and optimizer."""

    step: int
    extra: dict[str, Any]
    rank_state: Any  # this rank's; None if the number of ranks is another


def save(
    folder: _Path, model: Model, optimizer: Optimizer, step: int, extra: dict | None = None, rank_state: Any = None
) -> Path:
    """Write model, optimizer, `extra` (what JSON can say) and `rank_state` to folder/step-N; returns that path.

    All ranks write to one folder, on a file system that they share. `rank_state` is this rank's own, such as its
    random states: tensors and plain Python values. Until all is on the disk the name is step-N.incomplete; what a
    crash left under such names is removed. A damaged step-N that is in the way becomes step-N.damaged.

    Raises:
        CheckpointError: on every rank, if one cannot write, has a parameter or optimizer state with NaN or infinity,
            or has another folder than rank 0; or if step-N exists already. Other checkpoints are left alone.
    """
    folder = Path(folder)
    final, aside = folder / f"step-{step}", folder / f"step-{step}.incomplete"
    rank = place()[0]
    if on_first(final.exists) and _intact(final):
        raise CheckpointError(f"{final} exists already; resume from it, or choose another folder")

    def begin() -> str:
        for left in folder.glob("step-*.incomplete"):
            shutil.rmtree(left)
        with full_disk_named(folder):
            aside.mkdir(parents=True)
        return json.dumps(extra or {})

    def write_own() -> _Files:
        with full_disk_named(aside):
            own = _put(aside / f"rank-{rank}.pt", plain_bytes(rank_state))
        files = [own, *aside.glob(f"__{rank}_*"), *([aside / METADATA] if rank == 0 else [])]
        return {file.name: _describe(file) for file in files}

    def finish() -> None:
        files = {name: entry for share in shares for name, entry in share.items()}
        if strange := {file.name for file in aside.iterdir()} - files.keys():
            raise CheckpointError(f"{aside} holds {sorted(strange)}: does another run write there?")
        for writer, share in enumerate(shares):
            _check_arrived(aside, writer, share)
        with full_disk_named(aside):
            _put(aside / "checksums.json", _manifest(files))
        _sync(aside)
        if final.exists():
            shutil.rmtree(damaged := folder / f"{final.name}.damaged", ignore_errors=True)
            final.rename(damaged)
        aside.rename(final)
        _sync(folder)

    contents = Contents(model, optimizer)
    more = {"step": step, "extra": on_first(begin)}
    contents.write(aside, more)
    shares = together(write_own)
    on_first(finish)
    return final


def newest(folder: _Path) -> Path | None:
    """The complete checkpoint of most steps in a folder, damaged or not, as this rank sees it; None without any."""
    return next(iter(_complete(Path(folder))), None)


def load(path: _Path, model: Model, optimizer: Optimizer, accept: Accept | None = None) -> Loaded:
    """Read a checkpoint into a model and an optimizer, on any mesh; the model's gradients are dropped.

    It may come from anyone: no code in it is run, and no file outside of it is read. A parameter for which it has no
    optimizer state, as it had no gradient yet or was frozen, is as fresh to the optimizer as it was then.

    Args:
        accept: called with the checkpoint's step and `extra` before anything of it is loaded, to refuse it by raising a
            CheckpointError.

    Raises:
        DamagedError: on every rank, if a file is not what was written, or holds more than tensors and plain values.
        CheckpointError: on every rank, if it is of another model or optimizer, or cannot be read to its end. Unless
            the message says that a part was read, model and optimizer are as they were, after each of the errors.
    """
    path = Path(path)
    files, own = _verify(path), []
    rank, ranks = place()
    if {name for name in files if name.startswith("rank-")} == {f"rank-{each}.pt" for each in range(ranks)}:
        together(lambda: own.append(_read_own(path / f"rank-{rank}.pt")))
    if accept:
        readers: list[PlainReader] = []
        together(lambda: readers.append(PlainReader(path, files)))
        said = read_values(readers[0], {"step": 0, "extra": ""})
        together(lambda: accept(said["step"], json.loads(said["extra"])))
    optimizer.zero_grad()  # the optimizer may make a step to get its state
    read = Contents(model, optimizer).read(path, files, {"step": 0, "extra": ""})
    return Loaded(read["step"], json.loads(read["extra"]), own[0] if own else None)


def load_newest(folder: _Path, model: Model, optimizer: Optimizer, accept: Accept | None = None) -> Loaded | None:
    """Load the checkpoint of most steps that is not damaged; None if the folder has no checkpoint at all.

    Rank 0 logs a warning for each damaged one passed over; they stay where they are. `accept` is as for `load`.

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


def prune(folder: _Path, keep: int) -> None:
    """Delete all but the `keep` checkpoints of most steps and the newest intact one.

    The ranks share the work of telling which is intact; rank 0 deletes, and the others do not wait for it. What it
    cannot delete it logs.
    """
    if keep < 1:
        raise ValueError(f"keep must be positive; got {keep}")
    paths = on_first(lambda: _complete(Path(folder)))
    intact = next((path for path in paths if _intact(path)), None) if len(paths) > keep else None
    for path in paths[keep:] if intact and place()[0] == 0 else []:
        try:
            if path != intact:
                shutil.rmtree(path.rename(path.with_name(f"{path.name}.incomplete")))
        except OSError as error:
            _log.warning("%s is not deleted: %s", path, error)


def _complete(folder: Path) -> list[Path]:
    """Most steps first."""
    steps = {int(m[1]): path for path in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def _verify(path: Path) -> _Files:
    """Its files, found to be what was written; each rank reads a share of them."""
    files = on_first(lambda: _read_manifest(path / "checksums.json"))
    rank, ranks = place()
    share = sorted(files)[rank::ranks]
    together(lambda: [_check(path / name, files[name]) for name in share])
    return files


def _intact(path: Path) -> bool:
    try:
        _verify(path)
    except DamagedError:
        return False
    return True


def _check_arrived(folder: Path, rank: int, share: _Files) -> None:
    """Raises if rank 0 does not see what another rank wrote."""
    for name, entry in share.items():
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            size = None
        if size != entry["size"]:
            found = "is not there" if size is None else f"has {size} of {entry['size']} bytes"
            raise CheckpointError(
                f"rank {rank} wrote {folder / name}, which for rank 0 {found}: the folder must be the same for all "
                "ranks, on a file system that the nodes share. Nothing is saved"
            )


def _read_own(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DamagedError(
            f"{file} holds more than tensors and plain values; it may be code, and was not run"
        ) from None


def _check(file: Path, entry: dict[str, Any]) -> None:
    try:
        if not stat.S_ISREG((status := file.lstat()).st_mode):
            raise DamagedError(
                f"{file} is no plain file; a checkpoint may not point to files elsewhere: copy them into it"
            )
        if status.st_size != entry["size"]:
            raise DamagedError(f"{file} is torn: {status.st_size} of {entry['size']} bytes")
        if _describe(file) != entry:
            raise DamagedError(f"{file} has flipped bits: checksum differs")
    except OSError as error:
        raise DamagedError(f"{file} cannot be read: {error.strerror}") from None


def _read_manifest(file: Path) -> _Files:
    try:
        files = json.loads(text := file.read_bytes())["files"]
    except OSError as error:
        raise DamagedError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedError(f"{file} is torn or has flipped bits: {error}") from None
    if _manifest(files) != text:
        raise DamagedError(f"{file} has flipped bits: its own checksum differs")
    entries = files.items() if isinstance(files, dict) else [(files, None)]
    if bad := [name for name, entry in entries if not _is_ours(name, entry)]:
        raise DamagedError(f"{file} lists {bad[0]!r}, which is no file of a checkpoint")
    return files


def _is_ours(name: Any, entry: Any) -> bool:
    """Whether a file's entry in a list has the form that we write, and its name leads to no other folder."""
    plain = isinstance(name, str) and re.fullmatch(r"\.?\w[\w.-]*", name)
    return bool(plain) and isinstance(entry, dict) and entry.keys() == {"size", "sha256"}


def _manifest(files: _Files) -> bytes:
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": own}, indent=1, sort_keys=True).encode()


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"size": stream.tell(), "sha256": digest}


def _put(file: Path, data: bytes) -> Path:
    file.write_bytes(data)
    _sync(file)
    return file


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
