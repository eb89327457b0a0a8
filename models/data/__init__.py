"""Text as tokens on disk: shards that any number of ranks read by the batch, in an order that seed and step give.

`prepare` makes a folder of shards from text files and JSONL, `Source` opens one, and `Batches` reads the rows of a step
from one or several. On the command line: ``python -m turnout.models.data prepare OUT FILES...``.
"""

from .batches import Batches, HeldOut, Prefetcher
from .prepare import prepare
from .shards import DataError, Source
from .tokenizing import Bytes, Subwords, tokenizer_of

__all__ = [
    "Batches",
    "Bytes",
    "DataError",
    "HeldOut",
    "Prefetcher",
    "Source",
    "Subwords",
    "prepare",
    "tokenizer_of",
]
