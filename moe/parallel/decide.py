"""What a layer tries, and what it keeps: predictions propose, measurements decide. Pure functions of numbers.

Ranks that call it with the same numbers decide alike, so these are reduced over all ranks before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import log2
from typing import NamedTuple

from .costs import LayerChoice, LayerLoad

GAIN = 0.1  # share of the time that a change must be predicted to save
DOUBT = 0.3  # a prediction may be wrong by so much: what might be faster then is tried once
TRIALS = 4  # choices that are tried in one bucket, besides the first
DRIFT = 1.5  # a settled choice that takes so many times as long is doubted again


class Bucket(NamedTuple):
    """Loads that are decided alike: logarithms to base 2, in whole or half steps.

    Attributes:
        tokens: of a rank.
        expert, rank: largest load over the mean load, of experts and of ranks, in half steps.
    """

    tokens: int
    expert: int
    rank: int

    @classmethod
    def of(cls, load: LayerLoad, last: Bucket | None = None) -> Bucket:
        """The bucket of a load. Near its border, a load stays in the bucket that it was in last.

        >>> even = LayerLoad(1000.0, (0.25,) * 4, (0, 0, 1, 1))
        >>> Bucket.of(even)
        Bucket(tokens=10, expert=0, rank=0)
        >>> Bucket.of(even._replace(tokens=690), Bucket(10, 0, 0)), Bucket.of(even._replace(tokens=690))
        (Bucket(tokens=10, expert=0, rank=0), Bucket(tokens=9, expert=0, rank=0))
        """
        whole = sum(load.shares) or 1.0
        expert, rank = (max(shares) * len(shares) / whole for shares in (load.shares, load.ranks))
        place = log2(max(load.tokens, 1)), 2 * log2(max(expert, 1)), 2 * log2(max(rank, 1))
        if last is not None and all(abs(x - at) < 0.75 for x, at in zip(place, last, strict=True)):
            return last
        return cls(*map(round, place))


def decide(
    predicted: Mapping[LayerChoice, float], measured: Mapping[LayerChoice, float], current: LayerChoice
) -> LayerChoice:
    """What to do in the next steps: try a choice, keep the current one, or go back to a faster one.

    Measured times scale the predictions: the smallest ratio counts. A choice is tried if its scaled prediction, less
    `DOUBT`, is at least `GAIN` below the best measured time. One choice of each kind is tried, the best predicted
    first. When none is left, the fastest measured one stays.

    Args:
        predicted: seconds of each allowed choice.
        measured: seconds of choices that have been in use, the current one among them.
        current: the choice in use.

    >>> one, all_ = LayerChoice(1, 0, "flat", 1), LayerChoice(0, 0, "flat", 1)
    >>> decide({one: 2.0, all_: 1.0}, {one: 4.0}, one).parallelism  # may save half: it is tried
    0
    >>> decide({one: 2.0, all_: 1.0}, {one: 4.0, all_: 5.0}, all_).parallelism  # it took longer: back
    1
    >>> decide({one: 2.0, all_: 3.0}, {one: 4.0}, one).parallelism  # not worth a trial
    1
    """
    fastest = min(measured, key=lambda choice: (measured[choice], choice != current, choice))
    if len(measured) <= TRIALS:
        scale = min((measured[c] / predicted[c] for c in measured if c in predicted), default=1.0)
        tried = {choice.kind for choice in measured}
        hopes = {c: seconds * scale * (1 - DOUBT) for c, seconds in predicted.items() if c.kind not in tried}
        hope = min(hopes, key=lambda choice: (hopes[choice], choice), default=current)
        if hopes and hopes[hope] < (1 - GAIN) * measured[fastest]:
            return hope
    return fastest


@dataclass
class Decisions:
    """The decisions of one layer, with what they remember.

    Attributes:
        choice: the choice in use.
        bucket: the bucket of the last load.
        measured: seconds of choices that were tried, by bucket.
        settled: choices that stay, by bucket, with their seconds when they were settled.
    """

    choice: LayerChoice
    bucket: Bucket | None = None
    measured: dict[Bucket, dict[LayerChoice, float]] = field(default_factory=dict)
    settled: dict[Bucket, tuple[LayerChoice, float]] = field(default_factory=dict)
    drifts: int = 0

    def seconds(self, choice: LayerChoice) -> float | None:
        """What a choice has taken for loads like the last one; None if it is not known."""
        return self.measured.get(self.bucket, {}).get(choice) if self.bucket else None

    def next(
        self, load: LayerLoad, seconds: float | None, predict: Callable[[], Mapping[LayerChoice, float]]
    ) -> LayerChoice:
        """The choice for the next steps.

        Within one bucket it changes a bounded number of times, whatever is measured, and then stays. A bucket that
        comes again has its choice at once.

        Args:
            load: load of the last steps.
            seconds: measured time of the current choice in these steps; None if it is not known. Then predictions
                alone decide.
            predict: makes the predictions. It is called for buckets that are not settled.
        """
        last, self.bucket = self.bucket, Bucket.of(load, self.bucket)
        if self.bucket in self.settled:
            stays, usual = self.settled[self.bucket]
            slow = seconds is not None and stays == self.choice and self.bucket == last and seconds > DRIFT * usual
            self.drifts = self.drifts + 1 if slow else 0
            if self.drifts < 2:
                self.choice = stays
                return stays
            del self.settled[self.bucket], self.measured[self.bucket]
        self.drifts, predicted = 0, predict()
        if seconds is None:
            best = min(predicted, key=lambda choice: (predicted[choice], choice))
            if predicted[best] < (1 - GAIN) * predicted[self.choice]:
                self.choice = best
            self.settled[self.bucket] = self.choice, predicted[self.choice]
            return self.choice
        measured = self.measured.setdefault(self.bucket, {})
        before, measured[self.choice] = self.choice, seconds
        self.choice = decide(predicted, measured, before)
        if self.choice in measured:
            self.settled[self.bucket] = self.choice, measured[self.choice]
        return self.choice
