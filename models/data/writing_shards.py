"""Writing shards: token ids are appended by document, and a full shard is closed and checksummed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from .shards import Shard


class ShardWriter:
    """Writes one split of a folder, in a `with` block, after which `shards` has the facts.

    Args:
        split: name of the split.
        folder: folder, which exists.
        dtype: dtype of token ids, "<u2" or "<u4".
        eod: id of the token that begins each document.
        shard_tokens: number of tokens from which on the next document begins a new shard.
    """

    def __init__(self, split: str, folder: Path, dtype: str, eod: int, shard_tokens: int) -> None:
        self.split, self.folder, self.dtype, self.eod, self.shard_tokens = split, folder, dtype, eod, shard_tokens
        self.shards: list[Shard] = []
        self._open()

    def add(self, ids: Sequence[int] | np.ndarray, text_bytes: int) -> None:
        """Append a document of these token ids. Its text has `text_bytes` bytes."""
        if self._tokens >= self.shard_tokens:
            self._close()
            self._open()
        document = np.empty(len(ids) + 1, self.dtype)
        document[0], document[1:] = self.eod, ids
        data = document.tobytes()
        self._hash.update(data)
        self._file.write(data)
        self._places.append(self._tokens)
        self._tokens += len(document)
        self._bytes += text_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self._close()
        self._file.close()

    def _close(self) -> None:
        """Finish the shard that is open; one without documents is removed."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if not self._places:
            self._path.unlink()
            return
        places = np.array(self._places, "<u8").tobytes()
        self._path.with_suffix(".documents").write_bytes(places)
        self.shards.append(
            Shard(
                name=self._path.stem,
                tokens=self._tokens,
                documents=len(self._places),
                bytes=self._bytes,
                sha256=self._hash.hexdigest(),
                documents_sha256=hashlib.sha256(places).hexdigest(),
                modified=self._path.stat().st_mtime_ns,
            )
        )

    def _open(self) -> None:
        self._path = self.folder / f"{self.split}-{len(self.shards):05}.tokens"
        self._file = self._path.open("wb")
        self._hash, self._places, self._tokens, self._bytes = hashlib.sha256(), [], 0, 0
