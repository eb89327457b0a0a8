"""Memory budget of an exchange: a step that would hold too many rows on some rank runs in rounds, or drops rows."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field, replace
from math import ceil, prod
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from .dispatcher import Batch, Dispatcher, Experts
from .failure import named
from .place import LayerCall, Place
from .plan import Plan
from .reorder import wide
from .steps import Beside, Ready
from .traced import outside

log = logging.getLogger(__name__)
Over = Literal["rounds", "drop"]
RANKS = 2**20  # more than any job has: a rank and its rows are one number


@dataclass(frozen=True)
class BoundedDispatcher(Dispatcher):
    """Keeps the rows of another dispatcher below a budget, so that no routing runs a rank out of memory.

    A dropless layer needs memory for whatever the router sends. If all tokens choose one expert, its rank holds the
    rows of all ranks. With this dispatcher, ranks first exchange their sizes. If no rank would hold more than
    `max_rows` rows, the step runs as without a budget. Otherwise it runs in rounds, one after another. Each round has a
    part of every expert's rows, so it is bounded even if they all go to one expert.

    A round keeps nothing for the backward except its tokens and weights, which all rounds share. The backward computes
    it again, with its exchanges, so it is bounded as well. Results equal those without a budget up to rounding. All
    ranks run the same number of rounds.

    A budget costs one more exchange of sizes and one all-reduce of a number in each forward, with two host syncs.

    Args:
        inner: the dispatcher of each round, one of this package or another `SteppedDispatcher`.
        max_rows: the most rows that a rank sends, passes on or receives in one round. It must be above E times the
            ranks that share an expert's hidden width, because a round may have one row from each rank for each expert.
            Choose it above what a rank sends in a balanced step, T * k, or every step runs in rounds.
        over: what a step above the budget does. ``"rounds"``, the default, is exact. ``"drop"`` takes one round: each
            rank keeps ``max_rows // E`` assignments for each expert, those with the largest router weights. A warning
            says so once for each layer, and `MoE.stats` and `load` count them as dropped.

    Raises:
        ValueError: `max_rows` is no positive integer or too small, or `over` is another word. All ranks raise.
        TypeError: `inner` does not tell its sizes before its rows leave. All ranks raise.

    Examples:
        ``parallelize(model, mesh, max_rows=2**16)`` makes one for each layer. By hand, and between steps::

            layer.dispatcher = BoundedDispatcher(layer.dispatcher, max_rows=2**16)
            layer.dispatcher = dataclasses.replace(layer.dispatcher, max_rows=2**15)

    >>> from turnout.dispatch import LocalDispatcher
    >>> x, weight, plan = torch.ones(6, 1), torch.ones(6, 1), Plan.of(torch.zeros(6, 1, dtype=torch.int64), 1)
    >>> seen = []
    >>> bounded = BoundedDispatcher(LocalDispatcher(), max_rows=4)
    >>> y = bounded(x, plan, weight, lambda rows, weight, counts: (seen.append(int(counts)), rows)[1])
    >>> seen, y.flatten().tolist()
    ([3, 3], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    """

    inner: Dispatcher
    max_rows: int
    over: Over = "rounds"
    # rounds that were logged, by layer and policy; `dataclasses.replace` hands them on
    _told: dict[tuple[str, Over], int] = field(default_factory=dict, repr=False, compare=False, kw_only=True)
    _dropped: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)  # see `sent`

    def __post_init__(self) -> None:
        if not isinstance(self.max_rows, int) or isinstance(self.max_rows, bool) or self.max_rows < 1:
            raise ValueError(f"max_rows must be a positive integer; got {self.max_rows!r}")
        if self.over not in get_args(Over):
            raise ValueError(f"over must be one of {', '.join(get_args(Over))}; got {self.over!r}")

    def __call__(self, x: Tensor, plan: Plan, weight: Tensor, experts: Experts, beside: Beside | None = None) -> Tensor:
        """Dispatch, experts and combine, in as many rounds as the budget needs: x [T, D] -> y [T, D]."""
        if torch.compiler.is_compiling():
            return outside(self, x, plan, weight, experts)
        plan = self._started(plan)
        ready = self.inner.announce(x, plan, weight)
        if ready.counts is None:
            raise TypeError(
                f"max_rows needs a dispatcher that tells its sizes before its rows leave; {type(self.inner).__name__} "
                "is none: derive it from SteppedDispatcher"
            )
        # Blocks of rows of a rank: from each rank for each expert. Rounds and drops cut each of them.
        blocks = ready.counts.numel() * prod(dist.get_world_size(group) for group in self.groups)
        rounds = self._rounds(max(ready.rows, ready.most), blocks, x.device, plan.call)
        if rounds == 1:
            return self.inner(x, plan, weight, experts, beside)
        if self.over == "drop":
            fits = _largest(plan, weight, self.max_rows // blocks)
            self._dropped[_layer(plan.place)] = (plan.expert >= 0) & (fits.expert < 0)
            return self.inner(x, fits, weight, experts, beside)
        if gather := getattr(experts, "gather_weights", None):
            gather()  # weights that come here (`WeightTravel`) serve all rounds
        y = self._computed_again(x, plan, weight, experts, 0, rounds)
        dtype, y = y.dtype, wide(y)
        for number in range(1, rounds):
            y += self._computed_again(x, plan, weight, experts, number, rounds)
        return y.to(dtype)

    def _computed_again(self, *args: Any) -> Tensor:
        """A round that saves only its arguments, and is computed again in the backward."""
        # Every rank computes it again as a whole, whatever its experts keep: the last tensors that a dispatcher saves
        # are saved by `decode`, after the last exchange.
        return checkpoint(self._round, *args, use_reentrant=False)  # pyright: ignore[reportReturnType]

    def _round(self, x: Tensor, plan: Plan, weight: Tensor, experts: Experts, number: int, rounds: int) -> Tensor:
        return self.inner(x, plan.part(number, rounds), weight, experts)

    def announce(self, x: Tensor, plan: Plan, weight: Tensor) -> Ready:
        """Agree as `inner` does, without a budget, because no rows travel."""
        return self.inner.announce(x, self._started(plan), weight)

    def dispatch(self, x: Tensor, plan: Plan, weight: Tensor) -> Batch:
        """Dispatch of `inner`, without a budget."""
        return self.inner.dispatch(x, plan, weight)

    def combine(self, rows: Tensor, receipt: Any) -> Tensor:
        """Combine of `inner`."""
        return self.inner.combine(rows, receipt)

    def refuse(self, num_experts: int, device: torch.device, place: Place | None = None) -> None:
        """Refuse as `inner` does. The other ranks hear of it where they exchange sizes for the budget."""
        self.inner.refuse(num_experts, device, place)

    def sent(self, expert: Tensor, place: Place | None) -> Tensor:
        """The expert ids of the forward that has just run, with -1 for assignments that the budget dropped.

        Args:
            expert: expert ids of that forward, int64 [T, k], -1 for assignments that capacity dropped.
            place: the layer; None outside of `parallelize`.
        """
        if self.over == "rounds":
            return expert
        if torch.compiler.is_compiling():
            return outside(self.sent, expert, place)
        dropped = self._dropped.pop(_layer(place), None)
        return expert if dropped is None else expert.masked_fill(dropped, -1)

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """The groups of `inner`."""
        return self.inner.groups

    def _started(self, plan: Plan) -> Plan:
        plan = plan.started()
        self._dropped.pop(_layer(plan.place), None)  # of a forward that failed
        return plan if plan.call is None else replace(plan, call=plan.call._replace(max_rows=self.max_rows))

    def _rounds(self, rows: int, blocks: int, device: torch.device, call: LayerCall | None) -> int:
        """Number of rounds, the same on all ranks, if this rank would hold that many rows in a single one."""
        largest = torch.tensor(rows * RANKS + (dist.get_rank() if self.groups else 0), device=device)
        for group in self.groups:  # reductions over all groups in turn reach all ranks
            with named("the most rows of a rank", group, call):
                dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        rows, rank = divmod(int(largest), RANKS)
        if rows <= self.max_rows:
            return 1
        where = _layer(None if call is None else call.place)
        over = f"rank {rank} would hold {rows} rows in {where}, over max_rows={self.max_rows}"
        if self.max_rows <= blocks:
            raise ValueError(
                f"{over}, which is too small for {blocks} blocks, one from each rank for each expert: "
                f"set max_rows above {blocks}"
            )
        rounds = ceil((rows - blocks) / (self.max_rows - blocks))  # parts of blocks are rounded up
        told = self._told.get((where, self.over), 1)
        if rounds > told and self.over == "rounds":
            log.info("%s: it takes %d rounds", over, rounds)
        if self.over == "drop" and told == 1:
            warnings.warn(
                f"{over}: assignments beyond {self.max_rows // blocks} of each rank for each expert are dropped, in "
                'later steps without another warning; raise max_rows, balance the router, or set over="rounds", which '
                "drops nothing",
                stacklevel=2,
            )
        self._told[where, self.over] = max(rounds, told)
        return rounds


def _layer(place: Place | None) -> str:
    return "a layer" if place is None else f"layer {place.name!r}"


def _largest(plan: Plan, weight: Tensor, limit: int) -> Plan:
    """The plan with at most `limit` assignments for each expert, those with the largest weights.

    >>> plan = Plan.of(torch.tensor([[0], [0], [1]]), num_experts=2)
    >>> _largest(plan, torch.tensor([[0.2], [0.9], [0.1]]), 1).expert.tolist()
    [[-1], [0], [1]]
    """
    experts = plan.counts.numel()
    order = weight.detach().flatten().argsort(descending=True, stable=True)
    sorted_ = Plan.of(plan.expert.flatten()[order].unsqueeze(1), experts)
    start = sorted_.counts.cumsum(0) - sorted_.counts
    fits = (sorted_.slot - start[sorted_.expert.clamp(min=0)] < limit).flatten()
    expert = plan.expert.masked_fill(~torch.empty_like(fits).scatter_(0, order, fits).view_as(plan.expert), -1)
    capacity = None if plan.capacity is None else min(plan.capacity, limit)
    return replace(Plan.of(expert, experts, capacity, plan.place, plan.follows_load), call=plan.call)
