"""Text to token ids: bytes, or the subwords of a `tokenizer.json` of Hugging Face, given or trained on the text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .shards import DataError

FILE = "tokenizer.json"
END = "<|endoftext|>"
ENDS = (END, "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")  # names in common use


@dataclass(frozen=True)
class Bytes:
    """A token is a byte of UTF-8. Byte 0, which text does not use, begins a document; it is removed from text.

    Attributes:
        vocab: number of token ids.
        eod: id of the token that begins each document, which no text contains.
        name: ``"bytes"``; of `Subwords` it is the SHA-256 of the file.

    >>> next(iter(Bytes().encode(["ab"]))).tolist()
    [97, 98]
    """

    vocab: int = 256
    eod: int = 0
    name: str = "bytes"

    def encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """Token ids of each text, uint8."""
        for text in texts:
            yield np.frombuffer(text.replace("\0", "").encode(), np.uint8)

    def save(self, folder: Path) -> None:
        """Write nothing."""


class Subwords:
    """A tokenizer of Hugging Face, from its `tokenizer.json`. It needs the package `tokenizers`.

    The words of special tokens are ordinary text where a document contains them, so no text can end a document.

    Args:
        text: contents of the file.
        eod: name of the token that begins a document. None, the default, looks for one of the usual names.
        vocab: number of token ids. None, the default, is as many as the tokenizer has.

    It has the attributes of `Bytes`.

    Raises:
        DataError: no such token, or no tokenizer.
    """

    def __init__(self, text: str, eod: str | None = None, vocab: int | None = None) -> None:
        library = _tokenizers()
        try:
            self.tokenizer = library.Tokenizer.from_str(text)
        except Exception as error:  # the package raises no other class
            raise DataError(f"this is no tokenizer.json of Hugging Face: {error}") from None
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        ids = self.tokenizer.get_vocab(with_added_tokens=True)
        found = [name for name in ([eod] if eod else ENDS) if name in ids]
        if not found:
            raise DataError(
                f"the tokenizer has no token {eod or ' or '.join(ENDS)}: name the one that ends a document by --eod"
            )
        self.eod = ids[found[0]]
        self.vocab = max(ids.values()) + 1 if vocab is None else vocab
        self.name = hashlib.sha256(text.encode()).hexdigest()
        self._text = text

    def encode(self, texts: Sequence[str]) -> Iterator[Sequence[int]]:
        """Token ids of each text. The package uses all cores."""
        for encoding in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False):
            yield encoding.ids

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`."""
        (folder / FILE).write_text(self._text)

    @classmethod
    def trained(cls, texts: Iterable[str], vocab: int) -> Subwords:
        """Byte-level BPE of `vocab` tokens, trained on texts. Those of less text than it takes have ids unused.

        References:
            Sennrich et al., arXiv:1508.07909. Byte-level: GPT-2, 2019.
        """
        library = _tokenizers()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[END],
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str(), END, vocab)


Tokenizer = Bytes | Subwords


def tokenizer_of(what: str, eod: str | None = None) -> Tokenizer | int:
    """The tokenizer that a flag names, or the size of a BPE that is still to be trained.

    Args:
        what: ``"bytes"``, ``"bpe:SIZE"``, or a file of Hugging Face's `tokenizers` or its folder.
        eod: name of the token that begins a document. None, the default, looks for one of the usual names.

    Raises:
        DataError: another word, a size below 257, or a file that cannot be used.

    >>> tokenizer_of("bpe:4096")
    4096
    """
    if what == "bytes":
        return Bytes()
    kind, _, size = what.partition(":")
    if kind == "bpe":
        if not size.isdecimal() or int(size) < 257:
            raise DataError(f"{what}: a byte-level BPE has 257 tokens or more, as in bpe:4096")
        return int(size)
    path = Path(what) / FILE if Path(what).is_dir() else Path(what)
    if not path.is_file():
        raise DataError(f"{what} is no tokenizer: give bytes, bpe:4096, or a tokenizer.json of Hugging Face")
    try:
        return Subwords(path.read_text(), eod)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def size_of(what: str) -> tuple[int, int | None]:
    """Vocabulary of `tokenizer_of`, and its end-of-document token's id if that is known before training."""
    tokenizer = tokenizer_of(what)
    return (tokenizer, 0) if isinstance(tokenizer, int) else (tokenizer.vocab, tokenizer.eod)


def words_of(folder: Path) -> Any:
    """Function from token ids to text for a folder of prepared data."""
    file = folder / FILE
    if not file.exists():
        return lambda ids: bytes(ids).decode(errors="replace")
    return _tokenizers().Tokenizer.from_file(str(file)).decode


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise DataError(
            "subwords need the package tokenizers: pip install 'turnout[text]', or take the tokenizer bytes"
        ) from None
    return tokenizers
