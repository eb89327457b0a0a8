"""Making a folder of shards from text."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from .shards import DataError, Source, write_header
from .text_files import documents, files_in, split
from .tokenizing import Subwords, Tokenizer, tokenizer_of
from .writing_shards import ShardWriter

TOGETHER = 1024  # documents that are encoded at a time
SHARD_TOKENS = 1 << 28
BPE_BYTES = 1 << 28  # bytes of text from which a BPE is trained


def prepare(
    out: str | Path,
    paths: Sequence[str | Path | tuple[str, Path]],
    tokenizer: str | Tokenizer = "bytes",
    *,
    eod: str | None = None,
    field: str = "text",
    shard_tokens: int = SHARD_TOKENS,
) -> Source:
    """Make a folder of shards from text files, JSONL and folders of both. One process does it, with all its cores.

    One document in 16 is held out, by the hash of its name: a file's path, or path and line of JSONL.

    Args:
        out: folder to make. It is written as `out`.incomplete and then renamed.
        paths: files and folders, or pairs (name, path).
        tokenizer: ``"bytes"`` (the default), ``"bpe:SIZE"`` (a byte-level BPE, trained on the first 256 MiB of text),
            a `tokenizer.json` of Hugging Face or the folder that has one, or a `Tokenizer`.
        eod: name of the token that begins a document, for a `tokenizer.json` whose token has an unusual name.
        field: key of the text in JSONL, "text" by default.
        shard_tokens: number of tokens from which on a document begins a new shard.

    Raises:
        DataError: `out` exists, no text was found, or a file or a tokenizer cannot be used.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "text.jsonl").write_text('{"text": "one"}\\n{"text": "two"}\\n')
    >>> source = prepare(folder / "shards", [folder / "text.jsonl"])
    >>> bytes(source.document(1).tolist())
    b'two'
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists: name another folder, or delete it")
    if shard_tokens < 1:
        raise DataError(f"--shard-tokens must be positive; got {shard_tokens}")
    pairs = [each for each in paths if isinstance(each, tuple)]
    files = pairs + files_in(each for each in paths if not isinstance(each, tuple))
    tokenizer = _tokenizer(tokenizer, eod, files, field)
    aside = out.with_name(f"{out.name}.incomplete")
    if aside.exists():
        shutil.rmtree(aside)  # of a preparation that was killed
    aside.mkdir(parents=True)
    dtype = "<u2" if tokenizer.vocab <= 1 << 16 else "<u4"
    written = (aside, dtype, tokenizer.eod, shard_tokens)
    with ShardWriter("train", *written) as train, ShardWriter("held_out", *written) as held_out:
        for together in _batched(split(documents(files, field)), TOGETHER):
            texts = [text for _, text in together]
            for (is_held_out, text), ids in zip(together, tokenizer.encode(texts), strict=True):
                (held_out if is_held_out else train).add(ids, len(text.encode()))
    if not train.shards:
        shutil.rmtree(aside)
        raise DataError(f"there is no text in {', '.join(str(path) for _, path in files[:4]) or 'what was given'}")
    tokenizer.save(aside)
    facts = {"tokenizer": tokenizer.name, "vocab": tokenizer.vocab, "eod": tokenizer.eod, "dtype": dtype}
    write_header(aside, {"train": train.shards, "held_out": held_out.shards}, **facts)
    aside.rename(out)
    return Source.open(out)


def _tokenizer(given: str | Tokenizer, eod: str | None, files: Sequence[tuple[str, Path]], field: str) -> Tokenizer:
    found = tokenizer_of(given, eod) if isinstance(given, str) else given
    if not isinstance(found, int):
        return found
    return Subwords.trained(_first(text for held_out, text in split(documents(files, field)) if not held_out), found)


def _first(texts: Iterable[str]) -> Iterator[str]:
    """Texts until there are BPE_BYTES of them."""
    seen = 0
    for text in texts:
        yield text
        seen += len(text)
        if seen >= BPE_BYTES:
            return


def _batched(items: Iterable[tuple[bool, str]], size: int) -> Iterator[list[tuple[bool, str]]]:
    items = iter(items)
    while together := list(islice(items, size)):
        yield together
