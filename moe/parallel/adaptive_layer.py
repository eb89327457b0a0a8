"""One layer of `Adaptive`: what it did in the last steps, what it may do, and what it does next."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...dispatch.autoselect.profile import Choice
from ..layer import MoE
from ..names import called
from .costs import LayerChoice, LayerCosts, LayerLoad
from .decide import GAIN, Decisions
from .layer_time import LayerTimer
from .named_dispatchers import auto_of, choice_of, with_auto
from .plan_placement import plan_placement
from .weight_travel import can_gather, chosen

log = logging.getLogger(__name__)
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # numbers of shadowed experts to choose from
KEPT = 0.5  # weight of the load before the last steps
PAYS = 200  # steps in which a move of experts must save as much time as it takes
WAITS = 5  # decisions between two moves of a layer's experts
STALE = 0.8  # other experts are shadowed if the shadowed ones get less than this share of what the hottest ones get


class LayerReport(NamedTuple):
    """State of a layer after the last `every` steps of `Adaptive`, the same on all ranks.

    Attributes:
        choice: how the layer brings tokens and experts together from now on.
        shadow: ids of the experts that come to their tokens.
        tokens_per_expert: assignments to each expert in the last `every` steps.
        predicted: milliseconds of forward and backward in one of these steps, by the cost model.
        measured: measured milliseconds of forward and backward in a step, the mean over ranks; 0 if not timed.
        imbalance: milliseconds of `predicted` that an even load would save.
    """

    choice: LayerChoice
    shadow: tuple[int, ...]
    tokens_per_expert: tuple[int, ...]
    predicted: float
    measured: float
    imbalance: float


class Options(NamedTuple):
    """Values among which `Adaptive` chooses for a layer. A setting that the user has fixed has one value."""

    parallelisms: Sequence[int]
    shadows: Sequence[int]
    transports: Sequence[str]
    chunks: Sequence[int]

    @property
    def several(self) -> bool:
        """Whether there is anything to choose."""
        return any(len(part) > 1 for part in self)


@dataclass
class AdaptiveLayer:
    """A layer that `Adaptive` chooses for.

    Args:
        name: name of the layer in the model that `parallelize` got.
        layer: the layer.
        costs: its measured costs.
        max_bytes: as in `Adaptive`.
    """

    name: str
    layer: MoE
    costs: LayerCosts
    max_bytes: float | None = None
    timer: LayerTimer = field(default_factory=LayerTimer)
    options: Options | None = None
    decisions: Decisions | None = None  # of these options
    history: list[float] = field(default_factory=list)  # assignments to each expert, in which the last steps count most
    load: LayerLoad | None = None  # of the last steps
    forwards: float = 0.0  # in a step
    waited: int = WAITS - 1  # decisions since experts have moved

    def __post_init__(self) -> None:
        self.timer.attach(self.layer)
        self.seen = self.layer._count.total()

    def take(self, device: torch.device) -> Tensor:
        """Numbers of this rank since the last call, float64 on the device.

        They are the assignments to each expert, the number of dropped ones, forwards, and seconds of a step.
        """
        total = self.layer._count.total().to(device)
        counts = total - self.seen.to(device) if len(total) == len(self.seen) else total
        self.seen = total
        return torch.cat([counts.double(), torch.tensor([self.timer.take()], dtype=torch.float64).to(device)])

    def decide(self, counts: list[float], tokens: float, forwards: float, seconds: float, says: bool) -> LayerReport:
        """Choose for the next steps, from numbers that are the same on all ranks.

        Args:
            counts: assignments to each expert in the last steps, over all ranks.
            tokens: mean number of tokens of a rank in a forward.
            forwards: forwards in a step.
            seconds: measured time in a step, forward and backward; 0 if unknown.
            says: whether this rank logs changes.
        """
        old = self.history if len(self.history) == len(counts) else counts
        self.history = [KEPT * before + (1 - KEPT) * now for before, now in zip(old, counts, strict=True)]
        load, options = self._load(tokens), self._options()
        before = choice = self._current(options)
        if self.decisions is None or self.options != options or self.decisions.choice != before:
            # the user has changed a setting
            self.options, self.decisions = options, Decisions(before)
        predicted, even = (forwards * self._predicted(each, before) for each in (load, load.even))
        if options.several:
            choice = self.decisions.next(load, seconds or None, lambda: self.costs.predict(load, *options))
            if says and choice != before:
                known = self.decisions.seconds(choice)
                log.info(
                    "%s: %s -> %s; predicted %.3g -> %.3g ms, measured %.3g -> %s ms, for %.0f tokens of a rank",
                    *(called(self.name), before, choice),
                    *(1e3 * predicted, 1e3 * forwards * self._predicted(load, choice), 1e3 * seconds),
                    *("?" if known is None else f"{1e3 * known:.3g}", tokens),
                )
            self._use(choice, load)
        self.load, self.forwards, self.waited = load, forwards, self.waited + 1
        whole = tuple(round(n) for n in counts[: self.layer.num_experts])
        shadow = self.layer.shadow or ()
        return LayerReport(choice, shadow, whole, 1e3 * predicted, 1e3 * seconds, 1e3 * max(predicted - even, 0.0))

    def better_order(self, says: bool) -> tuple[int, ...] | None:
        """Order of the experts, as for `place_experts`, that is worth moving them; None if there is none.

        The best choice with it must be predicted to save `GAIN` of the best choice without, and within `PAYS` steps as
        much as the moves take.
        """
        links, now, E = self.costs.links, self.layer.experts.order, self.layer.num_experts
        ranks = links.ranks
        if self.load is None or self.options is None or ranks in (1, E) or self.waited < WAITS:
            return None
        nodes = links.nodes if links.locals > 1 else 1
        order = plan_placement(self.load.shares, ranks, nodes=nodes, current=now).order
        moved = self.load._replace(owners=owners(order, ranks))
        seconds = [self.forwards * min(self.costs.predict(each, *self.options).values()) for each in (self.load, moved)]
        before, after = owners(now, ranks), owners(order, ranks)
        arrivals = [sum(b == rank != a for a, b in zip(before, after, strict=True)) for rank in range(ranks)]
        state = self.costs.expert_bytes + 2 * self.costs.learned_bytes  # the parameters, and two moments of each
        cost, saved = links.block_time(max(arrivals) * state / max(ranks - 1, 1)), seconds[0] - seconds[1]
        if saved < GAIN * seconds[0] or saved * PAYS < cost:
            return None
        self.waited = 0
        if says:
            ms = (1e3 * each for each in (*seconds, cost))
            log.info("%s: experts move; predicted %.3g -> %.3g ms in a step, and %.3g ms once", called(self.name), *ms)
        return order

    @property
    def transport(self) -> Choice | None:
        """Transport and chunks that the layer's `AutoDispatcher` uses; None without one, or before the first batch."""
        auto = auto_of(self.layer.dispatcher)
        return None if auto is None else auto.chosen

    def use_transport(self, choice: Choice | None) -> None:
        """Let the layer's `AutoDispatcher`, if it has one, use a transport and chunks from now on."""
        auto = auto_of(self.layer.dispatcher)
        if auto is not None and choice is not None and auto.chosen != choice:
            self.layer.dispatcher = with_auto(self.layer.dispatcher, auto.using(choice))

    def end_step(self) -> None:
        """A step has ended."""
        self.timer.end_step()
        if self.layer.weights is not None and not self.layer.weights.stepped:
            self.layer.weights = replace(self.layer.weights, stepped=True)

    def _predicted(self, load: LayerLoad, choice: LayerChoice) -> float:
        r, shadow, transport, chunks = choice
        return self.costs.predict(load, [r], [shadow], [transport], [chunks])[choice]

    def _load(self, tokens: float) -> LayerLoad:
        """The load after capacity. Every expert of a padded layer computes as many rows as its limit."""
        E, whole = self.layer.num_experts, sum(self.history)
        shares = [n / whole for n in self.history[:E]]
        capacity = self.layer.capacity
        limit = None if capacity is None else capacity.limit(self.layer.top_k, 1000 * E, E, training=True)
        most = 1.0 if limit is None else limit / (1000 * E * self.layer.top_k)
        shares = [min(share, most) for share in shares]
        if capacity is not None and capacity.pad:
            shares = [max(shares) if capacity.follows_load[True] else most] * E
        return LayerLoad(tokens, tuple(shares), owners(self.layer.experts.order, self.costs.links.ranks))

    def _options(self) -> Options:
        travel, auto = self.layer.weights, auto_of(self.layer.dispatcher)
        E, size = self.layer.num_experts, self.costs.expert_bytes
        most = float("inf") if self.max_bytes is None else self.max_bytes / size
        parallelisms, shadows = [1], [0]
        if travel is not None:
            gathers = can_gather(self.layer.experts, travel)
            held, free = E / self.costs.links.ranks, travel.free
            parallelisms, shadows = [travel.parallelism], [len(travel.shadow)]
            if "parallelism" in free and gathers:
                needs = {r: E if r == 0 else held / r for r in travel.allowed[:-1]}
                parallelisms = [r for r in travel.allowed if needs.get(r, 0) <= most]
            pads = self.layer.capacity is not None and self.layer.capacity.pad  # which sends all rows all the same
            if "shadow" in free and gathers and travel.ep is not None and not pads:
                shadows = [0, *(n for n in COUNTS if n < E and n <= most)]
        if auto is None:
            used = choice_of(self.layer.dispatcher)
            return Options(parallelisms, shadows, [used.transport], [used.degree])
        several = min(self.costs.links.nodes, self.costs.links.locals) > 1
        return Options(parallelisms, shadows, [*auto.transports] if several else ["flat"], auto.degrees)

    def _current(self, options: Options) -> LayerChoice:
        travel, auto = self.layer.weights, auto_of(self.layer.dispatcher)
        r = 1 if travel is None else travel.parallelism
        used = Choice(options.transports[0], options.chunks[0])
        if r == 0:
            return LayerChoice(0, 0, *used)
        if auto is not None and auto.chosen is not None:
            used = auto.chosen
        return LayerChoice(r, 0 if travel is None else len(travel.shadow), *used)

    def _use(self, choice: LayerChoice, load: LayerLoad) -> None:
        layer, travel, ids = self.layer, self.layer.weights, load.hottest(choice.shadow)
        if travel is not None:
            if "shadow" not in travel.free:
                ids = travel.shadow
            elif len(travel.shadow) == len(ids):  # keep those that are there, unless others are much hotter
                shared = [sum(load.shares[e] for e in each) for each in (travel.shadow, ids)]
                ids = travel.shadow if shared[0] >= STALE * shared[1] else ids
            if (travel.parallelism, travel.shadow) != (choice.parallelism, tuple(sorted(ids))):
                new = chosen(travel, layer.place, layer.experts, parallelism=choice.parallelism, shadow=ids)
                layer.weights = replace(new, free=travel.free)
        if choice.parallelism:
            self.use_transport(Choice(choice.transport, choice.chunks))


def owners(order: Sequence[int], ranks: int) -> tuple[int, ...]:
    """The rank that owns each expert, from the expert in each slot.

    >>> owners([0, 3, 1, 2], ranks=2)
    (0, 1, 1, 0)
    """
    rank = {expert: slot * ranks // len(order) for slot, expert in enumerate(order)}
    return tuple(rank[expert] for expert in range(len(order)))
