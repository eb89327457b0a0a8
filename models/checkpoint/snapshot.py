"""All that a checkpoint will hold, and how it comes to the disk: complete under its name, or not at all."""

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

    path: Path  # where it will be
    values: dict[str, Any]  # by their names in the file; tensors are the model's and the optimizer's own
    rank_state: bytes

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
        """Nothing is written yet, and no tensor copied. All ranks of the group call it.

        Raises:
            CheckpointError: on every rank, if a sound checkpoint is there already, or one rank has what cannot be
                saved.
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
        """All ranks of the group call it; after an error nothing of it is left.

        Raises:
            WriteError: on every rank, if a disk is full or at fault.
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
                    _sync(aside / METADATA)  # torch does so before it has written its buffer (2.13)
                    files.append(aside / METADATA)
                return {file.name: describe(file) for file in files}

        def finish() -> None:
            files = {name: entry for share in shares for name, entry in share.items()}
            with disk_errors(aside):
                if strange := {file.name for file in aside.iterdir()} - files.keys():
                    raise CheckpointError(f"{aside} holds {sorted(strange)}: does another run write there?")
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
        except CheckpointError:  # of all ranks alike: none is writing now
            if rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise


def _check_arrived(folder: Path, rank: int, share: Files) -> None:
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
