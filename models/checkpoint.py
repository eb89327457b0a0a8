"""Checkpoints that any number of ranks can read, and that are read whole or not at all.

torch.distributed.checkpoint keeps the contents. What is spread over ranks are DTensors, experts in global order, and
what stages of a pipeline hold goes by the names of the whole model: a checkpoint of one mesh loads on any other.
The rest is the same on every rank and saved once. A checkpoint is written under another name, with the checksum of
each file, and renamed when all of it has reached the disk. What fails on one rank is raised on all of them; so all
ranks call each function here, `newest` excepted.

`model` is a module, or the stages of a pipeline that this rank runs, in a list (`ParallelModel.parts`). One optimizer
has the parameters of all of them.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as _read
from torch.distributed.checkpoint.state_dict_saver import save as _write
from torch.optim import Optimizer

from .together import CheckpointError, on_first, together

_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)  # not by position: groups differ between meshes
_NUMBER = re.compile(r"^((?:state|param_groups)\.)?\d+\.")  # of a module in a list of them, before its names
_Model = nn.Module | Sequence[nn.Module]
_Files = dict[str, dict[str, Any]]  # name: {"size": bytes, "sha256": hexadecimal}
_log = logging.getLogger(__name__)


class DamagedError(CheckpointError):
    """A checkpoint is not what was written; the message names a file that is torn, altered or cannot be read."""


class Loaded(NamedTuple):
    """What a checkpoint holds besides the state of model and optimizer."""

    step: int
    extra: dict[str, Any]
    rank_state: Any  # this rank's; None if the number of ranks is another


def save(
    folder: Path, model: _Model, optimizer: Optimizer, step: int, extra: dict | None = None, rank_state: Any = None
) -> Path:
    """Write model, optimizer, `extra` (what JSON can say) and `rank_state` to folder/step-N; returns that path.

    `rank_state` is this rank's own, such as its random states: tensors and plain Python values. Until all is on the
    disk the name is step-N.incomplete; what a crash left under such names is removed. A damaged step-N that is in
    the way becomes step-N.damaged.

    Raises:
        CheckpointError: on every rank, if one cannot write or step-N exists already; other checkpoints are left alone.
    """
    final, aside = folder / f"step-{step}", folder / f"step-{step}.incomplete"
    rank = dist.get_rank()
    if on_first(final.exists) and _intact(final):
        raise CheckpointError(f"{final} exists already; resume from it, or choose another folder")

    def begin() -> str:
        for left in folder.glob("step-*.incomplete"):
            shutil.rmtree(left)
        aside.mkdir(parents=True)
        return json.dumps(extra or {})

    def write_own() -> _Files:
        buffer = io.BytesIO()
        torch.save(rank_state, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)  # what cannot be read back is refused today
        own = _put(aside / f"rank-{rank}.pt", buffer.getvalue())
        files = [own, *aside.glob(f"__{rank}_*"), *([aside / ".metadata"] if rank == 0 else [])]
        return {file.name: _describe(file) for file in files}

    def finish() -> None:
        if strange := {file.name for file in aside.iterdir()} - files.keys():
            raise CheckpointError(f"{aside} holds {sorted(strange)}: does another run write there?")
        _put(aside / "checksums.json", _manifest(files))
        _sync(aside)
        if final.exists():
            shutil.rmtree(damaged := folder / f"{final.name}.damaged", ignore_errors=True)
            final.rename(damaged)
        aside.rename(final)
        _sync(folder)

    contents = {"step": step, "extra": on_first(begin)}
    try:
        _write(contents | _of_the_whole(_state(model, optimizer)), checkpoint_id=aside)
    except CheckpointException as error:  # not an Exception
        raise CheckpointError(f"{aside} cannot be written: {_cause(error)}") from None
    files = {name: entry for share in together(write_own) for name, entry in share.items()}
    on_first(finish)
    return final


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of most steps in a folder, damaged or not, as this rank sees it; None without any."""
    return next(iter(_complete(folder)), None)


def load(path: Path, model: _Model, optimizer: Optimizer) -> Loaded:
    """Read a checkpoint into a model and an optimizer, on any mesh; the model's gradients are dropped.

    Raises:
        DamagedError: on every rank, if a file is not what was written; model and optimizer are as they were.
        CheckpointError: on every rank, if it is of another model; model and optimizer are as they were.
    """
    files, own = _verify(path), []
    if dist.get_world_size() == sum(name.startswith("rank-") for name in files):
        file = path / f"rank-{dist.get_rank()}.pt"
        together(lambda: own.append(torch.load(file, map_location="cpu", weights_only=True)))
    optimizer.zero_grad()  # gradients would keep an optimizer that never stepped from getting its state
    fresh, mine = not optimizer.state, _state(model, optimizer)
    state = _of_the_whole(mine) | {"step": 0, "extra": ""}
    names = {name for everyones in together(lambda: list(state["model"])) for name in everyones}
    try:
        _read(state, checkpoint_id=path, planner=_WholeModel(names))
    except CheckpointException as error:
        if fresh:
            optimizer.state.clear()
        raise CheckpointError(f"{path} does not load: is it of a model of other sizes? {_cause(error)}") from None
    read = {kind: {name: state[kind][_whole_name(name)] for name in values} for kind, values in mine.items()}
    parts = {"model_state_dict": read["model"], "optim_state_dict": read["optimizer"]}
    set_state_dict(_listed(model), optimizer, **parts, options=_BY_NAME)
    return Loaded(state["step"], json.loads(state["extra"]), own[0] if own else None)


def load_newest(folder: Path, model: _Model, optimizer: Optimizer) -> Loaded | None:
    """Load the checkpoint of most steps that is not damaged; None if the folder has no checkpoint at all.

    Rank 0 logs a warning for each damaged one passed over; they stay where they are.

    Raises:
        CheckpointError: on every rank, if all are damaged, or the first intact one is of another model.
    """
    damaged = []
    for path in on_first(lambda: _complete(folder)):
        try:
            return load(path, model, optimizer)
        except DamagedError as error:
            damaged.append(str(error))
            if dist.get_rank() == 0:
                _log.warning("%s; trying the one before", error)
    if damaged:
        raise CheckpointError(f"no checkpoint in {folder} is intact: " + "; ".join(damaged))
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the `keep` checkpoints of most steps and the newest intact one.

    The ranks share the work of telling which is intact; rank 0 deletes, and the others do not wait for it. What it
    cannot delete it logs.
    """
    if keep < 1:
        raise ValueError(f"keep must be positive; got {keep}")
    paths = on_first(lambda: _complete(folder))
    intact = next((path for path in paths if _intact(path)), None) if len(paths) > keep else None
    for path in paths[keep:] if intact and dist.get_rank() == 0 else []:
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
    share = sorted(files)[dist.get_rank() :: dist.get_world_size()]
    together(lambda: [_check(path / name, files[name]) for name in share])
    return files


def _intact(path: Path) -> bool:
    try:
        _verify(path)
    except DamagedError:
        return False
    return True


def _check(file: Path, entry: dict[str, Any]) -> None:
    try:
        if (size := file.stat().st_size) != entry["size"]:
            raise DamagedError(f"{file} is torn: {size} of {entry['size']} bytes")
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
    return files


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


def _listed(model: _Model) -> nn.ModuleList:
    return nn.ModuleList([model] if isinstance(model, nn.Module) else model)


def _state(model: _Model, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """By names that begin with the number of a module; those of the optimizer's values by a kind before it."""
    states = get_state_dict(_listed(model), optimizer, options=_BY_NAME)
    return dict(zip(("model", "optimizer"), states, strict=True))


def _whole_name(name: str) -> str:
    return _NUMBER.sub(r"\1", name)


def _of_the_whole(state: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Without the numbers; what two stages have, the embedding, is there once."""
    return {kind: {_whole_name(name): value for name, value in values.items()} for kind, values in state.items()}


class _WholeModel(DefaultLoadPlanner):
    """Refuses a checkpoint of more than the model has; by default a small model would read its part of it."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = {f"model.{name}" for name in names}  # on all ranks

    def create_local_plan(self) -> LoadPlan:
        saved = self.metadata.state_dict_metadata if self.metadata else {}
        if left := [name for name in saved if name.startswith("model.") and name not in self.names]:
            raise ValueError(f"the model has no {left[0].removeprefix('model.')}")
        return super().create_local_plan()


def _cause(error: CheckpointException) -> str:
    rank = min(error.failures)
    return f"rank {rank}: {error.failures[rank][0]}"
