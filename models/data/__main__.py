"""Prepare text for training: python -m turnout.models.data prepare OUT FILES... [--tokenizer FILE|bpe:4096|bytes]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .prepare import SHARD_TOKENS, prepare
from .shards import DataError, Source
from .tokenizing import words_of


def parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    made = argparse.ArgumentParser(prog="python -m turnout.models.data", description=__doc__, allow_abbrev=False)
    commands = made.add_subparsers(dest="command", required=True)
    how = commands.add_parser("prepare", help="make a folder of token shards from text", allow_abbrev=False)
    how.add_argument("out", type=Path, help="folder to make")
    how.add_argument("files", nargs="+", help="text files (a document each), JSONL (a document a line), or folders")
    how.add_argument("--tokenizer", default="bytes", help="bytes (the default), bpe:SIZE, or a tokenizer.json")
    how.add_argument("--eod", help="name of the token that begins a document (default: <|endoftext|> and the like)")
    how.add_argument("--field", default="text", help="key of the text in JSONL (default: text)")
    how.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, help="tokens in a shard (default: 2^28)")
    show = commands.add_parser("show", help="say what a folder holds, or print a document", allow_abbrev=False)
    show.add_argument("folder", type=Path)
    show.add_argument("--document", type=int, help="number of a document to train on, from 0")
    verify = commands.add_parser("verify", help="compare all shards with their checksums", allow_abbrev=False)
    verify.add_argument("folder", type=Path)
    return made


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 2 if something is wrong with flags or files."""
    given = parser().parse_args(argv)
    try:
        if given.command == "prepare":
            options = {"eod": given.eod, "field": given.field, "shard_tokens": given.shard_tokens}
            print(described(prepare(given.out, given.files, given.tokenizer, **options)))
            return 0
        source = Source.open(given.folder)
        if given.command == "verify":
            source.check(whole=True)
            print(f"{given.folder}: all checksums agree")
        elif given.document is not None:
            print(words_of(given.folder)(source.document(given.document).tolist()))
        else:
            print(described(source))
    except (DataError, IndexError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def described(source: Source) -> str:
    """A folder in words."""
    lines = [f"{source.folder}: {source.vocab:,} token ids, {'bytes' if source.tokenizer == 'bytes' else 'subwords'}"]
    for name, tokens in (("to train on", source.train), ("held out", source.held_out)):
        documents = sum(shard.documents for shard in tokens.shards)
        per = tokens.bytes / max(1, len(tokens))
        lines.append(
            f"{name}: {documents:,} documents, {len(tokens):,} tokens, {tokens.bytes:,} bytes ({per:.2f} a token), "
            f"in {len(tokens.shards)} shards"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
