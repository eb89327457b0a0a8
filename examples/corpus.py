"""Byte-level text: training and held-out files, and batches that do not depend on the number of ranks."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 16  # one file in 16 is held out


def standard_library() -> list[tuple[str, Path]]:
    """Pairs (name, path) of Python's own source files, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = ((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
    return sorted((name, path) for name, path in files if not skip & set(name.split("/")))


def text_files(paths: Iterable[str]) -> list[tuple[str, Path]]:
    """Pairs (name, path) of these files, and of all files in these folders."""
    found: dict[str, Path] = {}
    for given in map(Path, paths):
        if not given.exists():
            raise ValueError(f"--data {given}: there is no such file or folder; check the path")
        inside = [given] if given.is_file() else [path for path in given.rglob("*") if path.is_file()]
        found |= {path.relative_to(given.parent).as_posix(): path for path in inside}
    return sorted(found.items())


def read(files: list[tuple[str, Path]], sequence: int) -> tuple[Tensor, Tensor]:
    """Training and held-out bytes, uint8 [n] each. Files that are not UTF-8 text are left out.

    The hash of a file's name decides whether it is held out, so the split is the same on every machine. With too few
    files the last part of the text is held out.

    Raises:
        ValueError: the text is too short for sequences of `sequence` bytes.
    """
    parts: tuple[list[bytes], list[bytes]] = [], []
    for name, path in files:
        data = path.read_bytes()
        try:
            data.decode()
        except UnicodeDecodeError:
            continue
        parts[hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0].append(data + b"\n")
    train, held_out = b"".join(parts[0]), b"".join(parts[1])
    if not train or not held_out:  # too few files to split by file
        both = train + held_out
        cut = len(both) - len(both) // HELD_OUT
        train, held_out = both[:cut], both[cut:]
    if min(len(train), len(held_out)) < 2 * (sequence + 1):
        raise ValueError(
            f"too little text for --seq {sequence}: {len(train)} bytes to train on and {len(held_out)} held out; give "
            f"at least {2 * (sequence + 1)} of each by --data"
        )
    return tuple(torch.from_numpy(np.frombuffer(part, np.uint8).copy()) for part in (train, held_out))


def digest(*texts: Tensor) -> str:
    """SHA-256 of the bytes to train on and to hold out."""
    whole = hashlib.sha256()
    for text in texts:
        whole.update(text.numpy())
    return whole.hexdigest()


def batch(
    data: Tensor, seed: int, step: int, size: int, sequence: int, rank: int, ranks: int, micro_batches: int = 1
) -> Tensor:
    """This rank's part of a step's batch, int64 [size / ranks, sequence + 1]. The batch depends on seed and step alone.

    The batch is cut into micro-batches, and each of these over the ranks. So a micro-batch has the same sequences on
    any number of ranks.
    """
    starts = np.random.default_rng([seed, step]).integers(0, len(data) - sequence, size)
    mine = torch.from_numpy(starts).view(micro_batches, ranks, -1)[:, rank]
    return windows(data, mine.flatten(), sequence)


def held_out(data: Tensor, size: int, sequence: int, rank: int, ranks: int) -> Tensor:
    """This rank's part of `size` sequences spread evenly over the text, int64 [size / ranks, sequence + 1]."""
    starts = torch.linspace(0, len(data) - sequence - 1, size, dtype=torch.float64).long()
    return windows(data, starts[rank::ranks], sequence)


def windows(data: Tensor, starts: Tensor, sequence: int) -> Tensor:
    """Sequences of bytes from each start, int64 [n, sequence + 1]: inputs, and targets one byte later."""
    return data[starts.unsqueeze(1) + torch.arange(sequence + 1)].long()
