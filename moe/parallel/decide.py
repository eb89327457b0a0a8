"""What a layer tries, and what it keeps: predictions propose, measurements decide. Pure functions of numbers.

Ranks that call it with the same numbers decide alike, so these are reduced over all ranks before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log2
from statistics import median
from typing import NamedTuple

from .costs import Kind, LayerChoice, LayerLoad

GAIN = 0.1  # share of the time that a change must be predicted to save
DOUBT = 0.3  # a prediction may be wrong by so much for a kind of choice that was never tried
NEAR = 0.14  # the same for another number, of chunks or shadowed experts, in the fastest choice
TRIALS = 6  # choices that are tried in one bucket, besides the first
NOISE = 0.2  # a choice that was slower by so much may be the fastest one
REPEATS = 3  # times that choices are measured between which noise may decide
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
    predicted: Mapping[LayerChoice, float],
    measured: Mapping[LayerChoice, Sequence[float]],
    ratios: Mapping[Kind, float],
    current: LayerChoice,
) -> tuple[LayerChoice, bool]:
    """What to do in the next steps: try a choice, measure one again, or keep the fastest; and whether that is settled.

    A kind that was tried with any load has its ratio of measured to predicted time, which corrects predictions. A kind
    that was never tried may be better than all others by `DOUBT`, and another number in the fastest choice by `NEAR`.
    A choice of a kind that was not tried in this bucket, or another number in the fastest choice, is tried if it is
    then expected to save `GAIN` of the best measured time, the best one first. When none is left, choices that are
    slower than the fastest by less than `NOISE` are measured up to `REPEATS` times, and so is the fastest. Then the
    fastest by the median stays.

    Args:
        predicted: seconds of each allowed choice.
        measured: seconds of choices that have been in use in this bucket, each time; the current one is among them.
        ratios: measured to predicted time of each kind that was ever in use, the current one among them.
        current: the choice in use.

    >>> one, all_ = LayerChoice(1, 0, "flat", 1), LayerChoice(0, 0, "flat", 1)
    >>> def step(predicted, measured, ratios, current):
    ...     choice, settled = decide(predicted, measured, {each.kind: ratio for each, ratio in ratios.items()}, current)
    ...     return choice.parallelism, settled
    >>> step({one: 2.0, all_: 1.0}, {one: [4.0]}, {one: 2.0}, one)  # may save half: it is tried
    (0, False)
    >>> step({one: 2.0, all_: 1.0}, {one: [4.0], all_: [5.0]}, {one: 2.0, all_: 5.0}, all_)  # back
    (1, True)
    >>> step({one: 2.0, all_: 1.0}, {one: [4.0], all_: [4.2]}, {one: 2.0, all_: 4.2}, all_)  # may be noise: once more
    (0, False)
    >>> step({one: 2.0, all_: 3.0}, {one: [4.0]}, {one: 2.0}, one)  # not worth a trial
    (1, True)
    >>> step({one: 2.0, all_: 1.0}, {one: [4.0]}, {one: 2.0, all_: 5.0}, one)  # it is known
    (1, True)
    """
    usual = {choice: median(times) for choice, times in measured.items()}
    fastest = min(usual, key=lambda choice: (usual[choice], choice != current, choice))
    if len(measured) <= TRIALS:
        unknown, tried = (1 - DOUBT) * min(ratios.values()), {choice.kind for choice in measured}
        expected = {c: s * ratios.get(c.kind, unknown) for c, s in predicted.items() if c.kind not in tried}
        ratio = (1 - NEAR) * usual[fastest] / predicted[fastest]
        expected |= {c: s * ratio for c, s in predicted.items() if c.kind == fastest.kind and c not in measured}
        best = min(expected, key=lambda choice: (expected[choice], choice), default=current)
        if expected and expected[best] < (1 - GAIN) * usual[fastest]:
            return best, False
    close = [choice for choice in measured if usual[choice] < (1 + NOISE) * usual[fastest]]
    again = [choice for choice in close if len(measured[choice]) < REPEATS]
    if len(close) > 1 and again:  # the current one first, so that fewer changes are made
        return min(again, key=lambda choice: (choice != current, usual[choice], choice)), False
    return fastest, True


@dataclass
class Decisions:
    """The decisions of one layer, with what they remember.

    Attributes:
        choice: the choice in use.
        bucket: the bucket of the last load.
        measured: seconds of choices that were tried, each time, by bucket.
        settled: choices that stay, by bucket, with their seconds when they were settled.
        ratios: measured to predicted time of each kind that was in use. Relations between kinds were measured when they
            were tried; the level is that of the last steps.
    """

    choice: LayerChoice
    bucket: Bucket | None = None
    measured: dict[Bucket, dict[LayerChoice, list[float]]] = field(default_factory=dict)
    settled: dict[Bucket, tuple[LayerChoice, float]] = field(default_factory=dict)
    ratios: dict[Kind, float] = field(default_factory=dict)
    drifts: int = 0

    def seconds(self, choice: LayerChoice) -> float | None:
        """What a choice has taken for loads like the last one; None if it is not known."""
        times = self.measured.get(self.bucket, {}).get(choice) if self.bucket else None
        return median(times) if times else None

    def next(
        self, load: LayerLoad, seconds: float | None, predict: Callable[[], Mapping[LayerChoice, float]]
    ) -> LayerChoice:
        """The choice for the next steps.

        Within one bucket it changes a bounded number of times, whatever is measured, and then stays. Kinds that were
        tried are tried in another bucket only if they are expected to save `GAIN`. A bucket that comes again has its
        choice at once.

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
            del self.settled[self.bucket]
            self.measured.pop(self.bucket, None)  # predictions alone may have settled it
            self.ratios = {}
        self.drifts, predicted = 0, predict()
        if self.choice not in predicted:  # the user had set it, and it is none of the allowed ones
            self.choice = min(predicted, key=lambda choice: (predicted[choice], choice))
            return self.choice
        if seconds is None:
            best = min(predicted, key=lambda choice: (predicted[choice], choice))
            if predicted[best] < (1 - GAIN) * predicted[self.choice]:
                self.choice = best
            self.settled[self.bucket] = self.choice, predicted[self.choice]
            return self.choice
        measured = self.measured.setdefault(self.bucket, {})
        before, times = self.choice, measured.setdefault(self.choice, [])
        times.append(seconds)
        ratio = median(times) / predicted[before]
        level = ratio / self.ratios.get(before.kind, ratio) if len(times) == 1 else 1.0
        self.ratios = {each: level * known for each, known in self.ratios.items()} | {before.kind: ratio}
        self.choice, settled = decide(predicted, measured, self.ratios, before)
        if settled:
            self.settled[self.bucket] = self.choice, median(measured[self.choice])
        return self.choice
