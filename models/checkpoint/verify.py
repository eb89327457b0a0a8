"""Verification of a checkpoint: file sizes, SHA-256 checksums, and finite numbers. Ranks share the reading.

`checksums.json` lists the files of a checkpoint, each with its size and SHA-256. It has a checksum of itself.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from .plain_files import PlainReader
from .together import DamagedError, on_first, place, together

CHECKSUMS = "checksums.json"
Files = dict[str, dict[str, Any]]  # name: {"size": bytes, "sha256": hexadecimal}


def verify(path: Path, group: ProcessGroup | None = None) -> tuple[Files, PlainReader]:
    """Verify a checkpoint, and return its list of files and a reader. All ranks of the group call it.

    Raises:
        DamagedError: on every rank, if a file differs from what was written, asks for code, or has a parameter or
            optimizer state with NaN or infinity.
    """
    files = on_first(lambda: read_list(path / CHECKSUMS), group)
    rank, ranks = place()
    readers: list[PlainReader] = []

    def check_share() -> None:
        for name in sorted(files)[rank::ranks]:
            _check(path / name, files[name])

    def check_numbers() -> None:
        readers.append(reader := PlainReader(path, files))
        reader.check_finite(rank, ranks)

    together(check_share, group)
    together(check_numbers, group)
    return files, readers[0]


def is_sound(path: Path, group: ProcessGroup | None = None) -> bool:
    """Whether `verify` finds nothing wrong. All ranks of the group call it."""
    try:
        verify(path, group)
    except DamagedError:
        return False
    return True


def describe(file: Path) -> dict[str, Any]:
    """Entry of a file in the list: its size in bytes, and its SHA-256."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"size": stream.tell(), "sha256": digest}


def as_list(files: Files) -> bytes:
    """Contents of `checksums.json` for these entries."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": own}, indent=1, sort_keys=True).encode()


def read_list(file: Path) -> Files:
    """Entries of a `checksums.json`.

    Raises:
        DamagedError: it differs from what was written, or lists something else than files of a checkpoint.
    """
    try:
        files = json.loads(text := file.read_bytes())["files"]
    except OSError as error:
        raise DamagedError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedError(f"{file} is torn or has flipped bits: {error}") from None
    if as_list(files) != text:
        raise DamagedError(f"{file} has flipped bits: its own checksum differs")
    entries = files.items() if isinstance(files, dict) else [(files, None)]
    if bad := [name for name, entry in entries if not _is_ours(name, entry)]:
        raise DamagedError(f"{file} lists {bad[0]!r}, which is no file of a checkpoint")
    return files


def _is_ours(name: Any, entry: Any) -> bool:
    """Whether an entry has the form that `describe` gives, and a name that stays inside the folder."""
    plain = isinstance(name, str) and re.fullmatch(r"\.?\w[\w.-]*", name)
    return bool(plain) and isinstance(entry, dict) and entry.keys() == {"size", "sha256"}


def _check(file: Path, entry: dict[str, Any]) -> None:
    try:
        if not stat.S_ISREG((status := file.lstat()).st_mode):
            raise DamagedError(
                f"{file} is no plain file; a checkpoint may not point to files elsewhere: copy them into it"
            )
        if status.st_size != entry["size"]:
            raise DamagedError(f"{file} is torn: {status.st_size} of {entry['size']} bytes")
        if describe(file) != entry:
            raise DamagedError(f"{file} has flipped bits: checksum differs")
    except OSError as error:
        raise DamagedError(f"{file} cannot be read: {error.strerror}") from None
