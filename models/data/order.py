"""The order of training samples, as a function of seed and position alone: nothing is shuffled or kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

ROUNDS = 6
UNIT = 20  # bits of a weight: shares of sources are multiples of 2^-20


def permuted(index: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """Places of `index` in a random permutation of range(size), without the permutation.

    A Feistel network permutes the next power of 4, and is applied again to what falls outside `size`.

    Args:
        index: positions in range(size), int64 [n].
        size: length of the permutation, 1 to 2^62.
        key: integers of 0 or more that choose the permutation.

    Returns:
        Other positions, int64 [n], all different.

    References:
        Luby and Rackoff, 1988. Cycle walking: Black and Rogaway, 2002.

    >>> sorted(permuted(np.arange(5), 5, key=[7]).tolist())
    [0, 1, 2, 3, 4]
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence(list(key)).generate_state(ROUNDS, np.uint64)
    found = np.asarray(index, np.int64).astype(np.uint64)
    todo = np.ones(len(found), bool)
    while todo.any():
        left, right = found[todo] >> half, found[todo] & low
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & low)
        found[todo] = (left << half) | right
        todo = found >= np.uint64(size)
    return found.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Mix the bits of each uint64 (the finalizer of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shares(rows: np.ndarray, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Source of each row, and number of rows of that source before it.

    Row n belongs to the first source if floor(n w) grows there, as in Bresenham's line. The others share what is left
    in the same way. So after any number of rows each source has had its share, to within one row for each source.

    Args:
        rows: numbers of rows, int64 [n], below 2^43.
        weights: positive weights of the sources, which need not add up to 1.

    Returns:
        Source and number, both int64 [n].

    >>> source, number = shares(np.arange(6), [2, 1])
    >>> source.tolist(), number.tolist()
    ([0, 1, 0, 0, 1, 0], [0, 0, 1, 2, 1, 3])
    """
    rest = np.asarray(rows, np.int64).copy()  # number of each row among those that no source has taken so far
    source, number = np.full(len(rest), len(weights) - 1, np.int64), rest.copy()
    free = np.ones(len(rest), bool)
    left = list(accumulate(reversed(weights)))[::-1]  # sum of this weight and those behind it
    for index, weight in enumerate(weights[:-1]):
        share = round(weight / left[index] * (1 << UNIT))
        before, after = ((n * share + (1 << UNIT - 1)) >> UNIT for n in (rest, rest + 1))
        taken = free & (after > before)
        source[taken], number[taken] = index, before[taken]
        free &= ~taken
        rest = rest - before
    number[free] = rest[free]
    return source, number
