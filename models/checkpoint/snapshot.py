"""Snapshot: the values that a checkpoint will hold, and an atomic write of them to the disk."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from .contents import Contents, Model
from .plain_files import METADATA, plain_bytes, write_values
from .together import CheckpointError, disk_errors, on_first, place, together
from .verify import CHECKSUMS, Files, as_list, describe, is_sound


class Snapshot(NamedTuple):
    """This rank's part of a checkpoint."""

    path: Path  # of the checkpoint, once it is complete
    values: dict[str, Any]  # name in the file: value; tensors are the model's and the optimizer's own
    rank_state: bytes  # as `torch.save` writes it

    @classmethod
    def of(
        cls,
        folder: Path,
        step: int,
        model: Model,
        optimizer: Optimizer,
        extra: dict | None,
        rank_state: Any,
        group: ProcessGroup | None = None,
    ) -> Snapshot:
        """Collect this rank's values, without writing them or copying tensors. All ranks of the group call it.

        The arguments are as for `turnout.models.checkpoint.save`. `group` is a group of all ranks; None, the default,
        is the default group.

        Raises:
            CheckpointError: on every rank, if an intact checkpoint of this step exists, or one rank has a value that
                cannot be saved.
        """
        path = folder / f"step-{step}"
        if on_first(path.exists, group) and is_sound(path, group):
            raise CheckpointError(f"{path} exists already; resume from it, or choose another folder")
        contents, rank, parts = Contents(model, optimizer), place()[0], []

        def collect() -> None:
            values = contents.values()
            if rank == 0:
                values |= {"step": step, "extra": json.dumps(extra or {})}
            parts.extend((values, plain_bytes(rank_state)))

        together(collect, group)
        return cls(path, *parts)

    def write(self, group: ProcessGroup | None = None) -> None:
        """Write the checkpoint. All ranks of the group call it. After an error nothing of it is left.

        Raises:
            WriteError: on every rank, if a disk is full or failing.
            CheckpointError: on every rank, if the folder is not the same for all ranks.
        """
        aside, rank = self.path.with_name(f"{self.path.name}.incomplete"), place()[0]

        def begin() -> None:
            with disk_errors(self.path.parent):
                for left in self.path.parent.glob("step-*.incomplete"):
                    shutil.rmtree(left)
                aside.mkdir(parents=True)

        def write_own() -> Files:
            with disk_errors(aside):
                files = [_put(aside / f"rank-{rank}.pt", self.rank_state), *aside.glob(f"__{rank}_*")]
                if rank == 0:
                    _sync(aside / METADATA)  # torch 2.13 syncs it before its buffer is written
                    files.append(aside / METADATA)
                return {file.name: describe(file) for file in files}

        def finish() -> None:
            files = {name: entry for share in shares for name, entry in share.items()}
            with disk_errors(aside):
                if strange := {file.name for file in aside.iterdir()} - files.keys():
                    raise CheckpointError(
                        f"{aside} holds other files, {sorted(strange)}: another run may write there. Use another folder"
                    )
                for writer, share in enumerate(shares):
                    _check_arrived(aside, writer, share)
                _put(aside / CHECKSUMS, as_list(files))
                _sync(aside)
                if self.path.exists():
                    shutil.rmtree(damaged := self.path.with_name(f"{self.path.name}.damaged"), ignore_errors=True)
                    self.path.rename(damaged)
                aside.rename(self.path)
                _sync(self.path.parent)

        on_first(begin, group)
        try:
            write_values(aside, self.values, group)
            shares = together(write_own, group)
            on_first(finish, group)
        except CheckpointError:  # raised on all ranks, so none is still writing
            if rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise


def _check_arrived(folder: Path, rank: int, share: Files) -> None:
    """Raise a CheckpointError if rank 0 does not see the files that another rank wrote."""
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


def _put(file: Path, data: bytes) -> Path:
    file.write_bytes(data)
    _sync(file)
    return file


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
