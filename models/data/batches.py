"""The rows of each step, as a function of seed and step alone, and a thread that reads them ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from .order import permuted, shares
from .shards import DataError, Source, Tokens

T = TypeVar("T")


class Mixture:
    """Sources and their weights, of one vocabulary.

    Args:
        sources: sources with a positive weight each. A source has its share of the rows, whatever its size.
        seq_len: number of tokens S in a sequence.

    Raises:
        DataError: sources of different tokenizers, or one with too little text.
    """

    split = "train"

    def __init__(self, sources: Sequence[tuple[Source, float]], seq_len: int) -> None:
        if not sources or not all(0 < weight < float("inf") for _, weight in sources):
            raise DataError(f"data needs one source or more, of positive weights; got {[w for _, w in sources]}")
        first = sources[0][0]
        for source, _ in sources[1:]:
            if (source.tokenizer, source.vocab, source.eod) != (first.tokenizer, first.vocab, first.eod):
                raise DataError(
                    f"{source.folder} has another vocabulary than {first.folder}: prepare both with one --tokenizer"
                )
        self.sources, self.weights = [source for source, _ in sources], [weight for _, weight in sources]
        self.seq_len, self.vocab, self.eod = seq_len, first.vocab, first.eod
        self.tokens: list[Tokens] = [getattr(source, self.split) for source in self.sources]
        for source, tokens in zip(self.sources, self.tokens, strict=True):
            if len(tokens) < 2 * seq_len:
                raise DataError(
                    f"{source.folder} has too little text to {'train on' if self.split == 'train' else 'hold out'} for "
                    f"sequences of {seq_len} tokens: {len(tokens)} tokens of {2 * seq_len} or more; give more text, or "
                    "a smaller --seq"
                )

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that a token stands for, in the mean over the rows that are read."""
        per = [weight * tokens.bytes / len(tokens) for weight, tokens in zip(self.weights, self.tokens, strict=True)]
        return sum(per) / sum(self.weights)

    def _rows(self, starts: np.ndarray, source: np.ndarray) -> Tensor:
        """Rows of S + 1 tokens from these starts, int64 [n, S + 1]."""
        rows = np.empty((len(starts), self.seq_len + 1), np.int64)
        for row, start, index in zip(rows, starts.tolist(), source.tolist(), strict=True):
            row[:] = self.tokens[index].read(start, self.seq_len + 1)
        return torch.from_numpy(rows)


class Batches(Mixture):
    """Batches to train on. Calling it with a step reads this rank's part of that step's batch.

    The tokens of a source, all its documents one after the other, are cut into rows of S + 1 tokens, each beginning
    with the last token of the row before. So all rows are full, and a document may go on in another row. In each epoch
    a source is cut at other places, and its rows come in another order.

    A step's rows are a function of `seed` and the step. The batch is cut into micro-batches, and each of these over the
    ranks: a micro-batch has the same rows on any number of ranks.

    Args:
        sources: sources with a positive weight each. A source has its share of the rows, whatever its size.
        seq_len: number of tokens S in a sequence.
        seed: chooses the order.
        batch: number of rows in a step, on all ranks together; a multiple of ranks x micro-batches.
        rank: this rank among those that have different parts of a batch (`Meshes.dense["dp"]`); 0 by default.
        ranks: number of these ranks, 1 by default.
        micro_batches: number of micro-batches of a step, 1 by default.

    Raises:
        DataError: sources of different tokenizers, or one with less than 2 S tokens.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, float]],
        seq_len: int,
        *,
        seed: int,
        batch: int,
        rank: int = 0,
        ranks: int = 1,
        micro_batches: int = 1,
    ) -> None:
        super().__init__(sources, seq_len)
        self.seed, self.batch = seed, batch
        self.mine = np.arange(batch).reshape(micro_batches, ranks, -1)[:, rank].ravel()  # this rank's rows of a batch
        self.rows = [len(tokens) // seq_len - 1 for tokens in self.tokens]  # in an epoch, wherever it is cut

    def __call__(self, step: int) -> Tensor:
        """Read this rank's rows of a step, counted from 0.

        Returns:
            Token ids, int64 [batch / ranks, S + 1], with the micro-batches in sequence.

        Raises:
            DataError: a shard was cut short, or has an id outside the vocabulary.
        """
        source, number = shares(step * self.batch + self.mine, self.weights)
        starts = np.empty_like(number)
        for index in np.unique(source):
            starts[source == index] = self._starts(int(index), number[source == index])
        return self._rows(starts, source)

    def passes(self, steps: int) -> list[float]:
        """Number of times that so many steps pass over each source."""
        rows = [steps * self.batch * weight / sum(self.weights) for weight in self.weights]
        return [read / all_rows for read, all_rows in zip(rows, self.rows, strict=True)]

    def _starts(self, source: int, number: np.ndarray) -> np.ndarray:
        """First token of each of these rows of a source, which are counted over all epochs."""
        epoch, place = np.divmod(number, self.rows[source])
        starts = np.empty_like(place)
        for each in np.unique(epoch):
            key = (self.seed, source, int(each))
            cut = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] % self.seq_len)
            here = epoch == each
            starts[here] = cut + permuted(place[here], self.rows[source], key) * self.seq_len
        return starts


class HeldOut(Mixture):
    """Held-out rows to evaluate with, spread evenly over the text of each source; arguments as in `Batches`."""

    split = "held_out"

    def __call__(self, size: int, rank: int = 0, ranks: int = 1) -> Tensor:
        """This rank's part of `size` rows, int64 [size / ranks, S + 1]. The rows do not depend on the ranks."""
        source, number = shares(np.arange(size), self.weights)
        starts = np.empty_like(number)
        for index, tokens in enumerate(self.tokens):
            here = source == index
            last = len(tokens) - self.seq_len - 1
            starts[here] = number[here] * last // max(1, int(here.sum()) - 1)
        return self._rows(starts[rank::ranks], source[rank::ranks])


class Prefetcher(Generic[T]):
    """Reads the batches of the next steps on a thread, while a step is computed. Use it in a `with` block.

    Args:
        batches: function from a step to its batch, such as `Batches`.
        end: number of steps; no batch from there on is read.
        ahead: number of batches that are read ahead, 2 by default.

    >>> with Prefetcher(lambda step: torch.tensor(step), end=3) as batch:
    ...     [int(batch(step)) for step in range(3)]
    [0, 1, 2]
    """

    def __init__(self, batches: Callable[[int], T], end: int, ahead: int = 2) -> None:
        self.batches, self.end, self.ahead = batches, end, ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._coming: dict[int, Future[T]] = {}

    def __call__(self, step: int) -> T:
        """The batch of a step. An error of the thread is raised here."""
        for number in range(step, max(step + 1, min(step + 1 + self.ahead, self.end))):
            if number not in self._coming:
                self._coming[number] = self._thread.submit(self.batches, number)
        return self._coming.pop(step).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
