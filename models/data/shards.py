"""The format of tokens on disk, and how they are read.

A folder has `header.json` and, for each split ("train" and "held_out"), shards of two files. `train-00000.tokens` holds
token ids, little-endian uint16 or uint32. Each document begins with the end-of-document token. `train-00000.documents`
holds the place of each of these tokens, uint64. numpy reads both with `np.fromfile` or `np.memmap`.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "turnout tokens 1"
HEADER = "header.json"
SPLITS = ("train", "held_out")
OPEN_FILES = 64  # most files that one split keeps open


class DataError(ValueError):
    """Data that cannot be used. The message names the file."""


@dataclass(frozen=True)
class Shard:
    """Facts about one shard.

    Attributes:
        name: name of its files, without their suffixes.
        tokens: number of token ids, end-of-document tokens included.
        documents: number of documents.
        bytes: number of bytes of text, as UTF-8.
        sha256: checksum of the token ids.
        documents_sha256: checksum of the documents' places.
        modified: when the token ids were written, in nanoseconds. A file with another time is read whole and compared
            with the checksum before it is used.
    """

    name: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    documents_sha256: str
    modified: int


class Tokens:
    """The token ids of one split, as if its shards were one array. Threads may share it.

    It reads with `os.pread`, not through a memory map. A memory map that meets a file cut short kills the process
    without a message, and its pages count as the process's memory.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: np.dtype, vocab: int) -> None:
        self.folder, self.shards, self.dtype, self.vocab = folder, tuple(shards), dtype, vocab
        self._ends = list(accumulate(shard.tokens for shard in shards))
        self._files: OrderedDict[int, int] = OrderedDict()  # shard: file descriptor, the last one used at the end

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokens:
        return Tokens(self.folder, self.shards, self.dtype, self.vocab)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokens, (self.folder, self.shards, self.dtype, self.vocab)

    @property
    def bytes(self) -> int:
        """Number of bytes of text, as UTF-8."""
        return sum(shard.bytes for shard in self.shards)

    def read(self, start: int, count: int) -> np.ndarray:
        """Read `count` token ids from position `start` on, as int64 [count].

        Raises:
            DataError: a shard has become shorter since it was opened, or has an id outside the vocabulary.
            IndexError: the positions lie outside the split.
        """
        if start < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} to {start + count} lie outside the {len(self)} of {self.folder}")
        row, done = np.empty(count, np.int64), 0
        index = bisect_right(self._ends, start)
        while done < count:
            shard = self.shards[index]
            first = start + done - (self._ends[index] - shard.tokens)
            part = min(count - done, shard.tokens - first)
            row[done : done + part] = self._part(index, first, part)
            done, index = done + part, index + 1
        if row.max(initial=0) >= self.vocab:
            place = start + int(row.argmax())
            index = bisect_right(self._ends, place)
            raise DataError(
                f"{self.path(index)} has token {row.max()} at {place - self._ends[index] + self.shards[index].tokens}, "
                f"outside its vocabulary of {self.vocab}: prepare the data again"
            )
        return row

    def path(self, index: int) -> Path:
        """File of a shard's token ids."""
        return self.folder / f"{self.shards[index].name}.tokens"

    def _part(self, index: int, first: int, count: int) -> np.ndarray:
        size = self.dtype.itemsize
        data = os.pread(self._file(index), count * size, first * size)
        if len(data) < count * size:
            raise DataError(f"{self.path(index)} has become shorter since it was opened: prepare the data again")
        return np.frombuffer(data, self.dtype)

    def _file(self, index: int) -> int:
        if index in self._files:
            self._files.move_to_end(index)
        else:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[index] = os.open(self.path(index), os.O_RDONLY)
        return self._files[index]


@dataclass(frozen=True)
class Source:
    """A folder of prepared data. `Source.open` reads its header alone, so it takes no longer for more data.

    Attributes:
        folder: the folder.
        vocab: number of token ids.
        eod: id of the token that begins each document.
        tokenizer: ``"bytes"``, or the SHA-256 of the folder's `tokenizer.json`.
        train: token ids to train on.
        held_out: token ids to evaluate with.
        fingerprint: SHA-256 of all that the header says of the data. It does not depend on where the folder is, nor on
            the times of its files.
    """

    folder: Path
    vocab: int
    eod: int
    tokenizer: str
    train: Tokens
    held_out: Tokens
    fingerprint: str

    @classmethod
    def open(cls, folder: str | Path) -> Source:
        """Open a folder that `prepare` has made, and compare the sizes of its shards with the header.

        Raises:
            DataError: no header or a damaged one, or a shard that is missing or not as long as it should be.
        """
        folder = Path(folder)
        header = read_header(folder)
        dtype = np.dtype(header["dtype"])
        splits = {name: [Shard(**shard) for shard in header["splits"][name]] for name in SPLITS}
        for shard in [shard for shards in splits.values() for shard in shards]:
            for suffix, size in (("tokens", shard.tokens * dtype.itemsize), ("documents", shard.documents * 8)):
                path = folder / f"{shard.name}.{suffix}"
                found = path.stat().st_size if path.exists() else None
                if found != size:
                    has = "is missing" if found is None else f"is torn: it has {found:,} bytes of {size:,}"
                    raise DataError(f"{path} {has}; copy the folder again, or prepare it again")
        vocab, eod, tokenizer = header["vocab"], header["eod"], header["tokenizer"]
        train, held_out = (Tokens(folder, splits[name], dtype, vocab) for name in SPLITS)
        return cls(folder, vocab, eod, tokenizer, train, held_out, fingerprint(header))

    def check(self, part: int = 0, parts: int = 1, whole: bool = False) -> None:
        """Compare shards with their checksums, if their time says that they were written since `prepare`.

        Ranks of one node can share the work: each calls it with its own `part` of so many `parts`.

        Args:
            part: number of this part, from 0.
            parts: number of parts, 1 by default.
            whole: whether to read all shards, whatever their time; False by default.

        Raises:
            DataError: a shard has changed. The message names it.
        """
        shards = [(tokens.path(i), s) for tokens in (self.train, self.held_out) for i, s in enumerate(tokens.shards)]
        for path, shard in shards[part::parts]:
            if not whole and path.stat().st_mtime_ns == shard.modified:
                continue
            if sha256(path) != shard.sha256:
                raise DataError(f"{path} has changed since it was prepared: copy the folder again, or prepare it again")
            if whole and sha256(path.with_suffix(".documents")) != shard.documents_sha256:
                raise DataError(f"{path.with_suffix('.documents')} has changed since it was prepared")

    def document(self, number: int, split: str = "train") -> np.ndarray:
        """Token ids of one document, counted from 0, int64 [n], without the end-of-document token."""
        tokens: Tokens = getattr(self, split)
        start = 0
        for shard in tokens.shards:
            if number < shard.documents:
                places = np.memmap(self.folder / f"{shard.name}.documents", "<u8", mode="r", shape=(shard.documents,))
                first = int(places[number])
                last = int(places[number + 1]) if number + 1 < shard.documents else shard.tokens
                return tokens.read(start + first + 1, last - first - 1)
            number, start = number - shard.documents, start + shard.tokens
        raise IndexError(f"{self.folder} has fewer documents in {split}")


def read_header(folder: Path) -> dict[str, Any]:
    """Header of a folder of prepared data; a DataError if there is none or it is damaged."""
    path = folder / HEADER
    try:
        header = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{folder} has no {HEADER}: python -m turnout.models.data prepare makes it") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): copy the folder again, or prepare it again") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise DataError(f"{path} is no header of the format {FORMAT!r}: prepare the data again")
    try:
        for shard in [shard for name in SPLITS for shard in header["splits"][name]]:
            Shard(**shard)
        _ = np.dtype(header["dtype"]), int(header["vocab"]), int(header["eod"]), str(header["tokenizer"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error!r}): copy the folder again, or prepare it again") from None
    return header


def write_header(folder: Path, splits: dict[str, list[Shard]], **facts: Any) -> None:
    """Write the header, after all shards: a folder without it is not finished. `facts` are dtype, vocab and so on."""
    shards = {name: [asdict(shard) for shard in shards] for name, shards in splits.items()}
    (folder / HEADER).write_text(json.dumps({"format": FORMAT, **facts, "splits": shards}, indent=1) + "\n")


def fingerprint(header: dict[str, Any]) -> str:
    """SHA-256 of a header without the times of files."""
    splits = {
        name: [{key: value for key, value in shard.items() if key != "modified"} for shard in shards]
        for name, shards in header["splits"].items()
    }
    return hashlib.sha256(json.dumps({**header, "splits": splits}, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
