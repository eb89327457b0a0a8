"""Documents from text files, JSONL and folders of both, and which of them are held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from .shards import DataError

HELD_OUT = 16  # one document in so many is held out
FEW = 16 * HELD_OUT  # of fewer documents none may be held out by chance
LINES = (".jsonl", ".ndjson")  # suffixes of files with a document on each line


class Document(NamedTuple):
    """A text and its name, which decides whether it is held out."""

    name: str
    text: str


def files_in(paths: Iterable[str | Path]) -> list[tuple[str, Path]]:
    """Pairs (name, path) of these files, and of all files in these folders, sorted by name.

    A name begins with the last part of the path that was given. If a file of an earlier path has the same name, the
    number of the path is put before it.

    Raises:
        DataError: a path that does not exist.
    """
    found: dict[str, Path] = {}
    for number, given in enumerate(map(Path, paths)):
        if not given.exists():
            raise DataError(f"{given}: there is no such file or folder; check the path")
        inside = [given] if given.is_file() else [path for path in given.rglob("*") if path.is_file()]
        for path in inside:
            name = path.relative_to(given.parent).as_posix()
            taken = name in found and not found[name].samefile(path)
            found[f"//{number}/{name}" if taken else name] = path
    return sorted(found.items())


def documents(files: Sequence[tuple[str, Path]], field: str = "text") -> Iterator[Document]:
    """Documents of files, in order, without NUL characters. Empty ones, and files that are not UTF-8, are left out.

    Args:
        files: pairs (name, path). A file whose name ends in .jsonl has a JSON object with a document on each line, any
            other file is one document.
        field: key of the text in JSON objects, "text" by default.

    Raises:
        DataError: a line of JSONL that is no object with such a text. The message names file and line.
    """
    for name, path in files:
        if path.suffix in LINES:
            yield from _of_lines(name, path, field)
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text := text.replace("\0", ""):
            yield Document(name, text)


def _of_lines(name: str, path: Path, field: str) -> Iterator[Document]:
    with path.open("rb") as lines:  # json decodes a line by itself, so an error has its number
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
                if not isinstance(text, str):
                    raise TypeError(f"its {field!r} is {type(text).__name__}")
                text.encode()  # lone surrogates are JSON, but no text
            except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
                raise DataError(
                    f"{path}, line {number}, is no JSON object with a text under {field!r} ({error!r}): name another "
                    "key by --field, or mend the file"
                ) from None
            if text := text.replace("\0", ""):
                yield Document(f"{name}:{number}", text)


def split(found: Iterable[Document]) -> Iterator[tuple[bool, str]]:
    """Pairs (whether it is held out, text) of documents.

    The hash of a name decides, so a document stays on its side when others come. If there are so few documents that
    one side might stay empty, the last part of each is held out.
    """
    found = iter(found)
    first = list(islice(found, FEW))
    sides = {held_out(document.name) for document in first}
    if len(first) < FEW and sides != {True, False}:
        for document in first:
            cut = len(document.text) - len(document.text) // HELD_OUT
            yield False, document.text[:cut]
            if document.text[cut:]:
                yield True, document.text[cut:]
        return
    for document in chain(first, found):
        yield held_out(document.name), document.text


def held_out(name: str) -> bool:
    """Whether the document of this name is held out."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0
