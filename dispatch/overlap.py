"""Travel while experts compute: a batch in chunks, each under way while the one before is computed.

The idea is that of the smart schedule of FasterMoE (doi:10.1145/3503221.3508418) and of the adaptive
pipelining of Tutel (arXiv:2206.03382). Here autograd owns the backward: see `interleave`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .dispatcher import Batch, Dispatcher, Experts
from .place import Place
from .plan import Plan
from .steps import Steps, announce, interleave, prepare, refuse
from .torch_internals import in_backward
from .traced import outside


@dataclass(frozen=True)
class OverlapDispatcher(Dispatcher):
    """Another dispatcher's trips, in `degree` chunks that overlap, forward and backward.

    The results are those of `inner` up to rounding (the experts see the same rows in smaller batches),
    and exactly the same assignments are dropped: the plan is made before. Every rank has `degree` chunks,
    whatever its tokens; empty ones take part. Sizes and notes of all chunks go ahead in one exchange, with
    one host sync, before any row travels, so that nothing waits for the host afterwards.

    Ragged plans are cut by tokens. Padded ones are cut by rows: a chunk has a share of every expert's
    capacity, and as many rows travel as in one piece; cut by tokens, any chunk might need it all.

    Args:
        inner: what carries each chunk. Its exchanges overlap with compute if it is in steps
            (`SteppedDispatcher`), as all of ours are; another one works, chunk after chunk.
        degree: number of chunks, the same on all ranks. ``"auto"`` tries 1, 2 and 4 for three training
            steps each and keeps the one whose steps were fastest on the slowest rank. A step lasts from the first
            trip to the first one after its backward, optimizer included. This measurement is the one
            thing that a dispatcher keeps. Where backwards and forwards of several micro-batches
            alternate (1F1B) under activation checkpointing, give a number: a recomputed forward must be
            cut as the first one was.
    """

    inner: Dispatcher
    degree: int | Literal["auto"]
    _trial: _Trial = field(default_factory=lambda: _Trial(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.degree != "auto" and (not isinstance(self.degree, int) or self.degree < 1):
            raise ValueError(f'degree must be a positive integer or "auto"; got {self.degree!r}')

    def __call__(self, x: Tensor, plan: Plan, weight: Tensor, experts: Experts) -> Tensor:
        """The whole trip, interleaved: x [T, D] -> y [T, D]."""
        if torch.compiler.is_compiling():
            return outside(self, x, plan, weight, experts)
        degree = self._degree_now(x.device)
        if degree == 1:
            y = self.inner(x, plan, weight, experts)
        else:
            plan = plan.visiting(degree)
            xs, plans, weights = _cut(x, plan, weight, degree)
            trips = [self._trip(*chunk, experts) for chunk in zip(xs, plans, weights, strict=True)]
            prepare(trips, plan.visit)
            ys = interleave(trips, plan.visit)
            y = torch.cat(ys) if plan.capacity is None else torch.stack(ys).sum(0)
        if self.degree == "auto":
            self._trial.watch(y)
        return y

    def announce(self, x: Tensor, plan: Plan, weight: Tensor) -> None:
        """For as many chunks as would travel: ranks that send them read these notes."""
        degree = self._degree_now(x.device)
        if degree == 1:
            return self.inner.announce(x, plan, weight)
        plan = plan.visiting(degree).without_rows()
        return announce([self.inner.dispatch_steps(x, plan, weight) for _ in range(degree)], plan.visit)

    def dispatch(self, x: Tensor, plan: Plan, weight: Tensor) -> Batch:
        """As `inner`, in one piece."""
        return self.inner.dispatch(x, plan, weight)

    def combine(self, rows: Tensor, receipt: Any) -> Tensor:
        """As `inner`, in one piece."""
        return self.inner.combine(rows, receipt)

    def refuse(self, num_experts: int, device: torch.device, place: Place | None = None) -> None:
        """A refusal for every chunk that the other ranks are about to send."""
        refusals = [self.inner.refuse_steps(num_experts, device) for _ in range(self._degree_now(device))]
        refuse(refusals, None if place is None else place.visit())

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """Those of `inner`."""
        return self.inner.groups

    def _trip(self, x: Tensor, plan: Plan, weight: Tensor, experts: Experts) -> Steps[Tensor]:
        batch = yield from self.inner.dispatch_steps(x, plan, weight)
        rows = experts(batch.rows, batch.weight, batch.counts)
        return (yield from self.inner.combine_steps(rows, batch.receipt))

    def _degree_now(self, device: torch.device) -> int:
        return self._trial.degree(device, self.groups) if self.degree == "auto" else self.degree


def _cut(x: Tensor, plan: Plan, weight: Tensor, degree: int) -> tuple[tuple[Tensor, ...], list[Plan], tuple]:
    """Tokens, plans and weights of the chunks."""
    if plan.capacity is not None:
        return (x,) * degree, _by_rows(plan, plan.capacity, degree), (weight,) * degree
    sizes = _shares(x.shape[0], degree)
    whole = [Plan.of(expert, plan.counts.numel(), place=plan.place) for expert in plan.expert.split(sizes)]
    plans = [replace(part, visit=plan.visit) for part in whole]
    return x.split(sizes), plans, weight.split(sizes)


def _shares(number: int, degree: int) -> list[int]:
    """Nearly equal parts of a number.

    >>> _shares(7, 3), _shares(1, 3)
    ([2, 2, 3], [0, 0, 1])
    """
    return [(i + 1) * number // degree - i * number // degree for i in range(degree)]


def _by_rows(plan: Plan, capacity: int, degree: int) -> list[Plan]:
    """Cut a padded plan: each part has all tokens and, of every expert, some of its `capacity` rows.

    >>> [p.token.tolist() for p in _by_rows(Plan.of(torch.tensor([[0], [0], [1]]), 2, capacity=2), 2, degree=2)]
    [[0, 2], [1, -1]]
    """
    shares = _shares(capacity, degree)
    place = plan.slot % max(capacity, 1)  # within the expert's rows
    rows = plan.token.view(plan.counts.numel(), capacity).split(shares, 1)
    plans, first = [], 0
    for share, token in zip(shares, rows, strict=True):
        mine = (plan.slot >= 0) & (place >= first) & (place < first + share)
        slot = torch.where(mine, plan.expert * share + place - first, -1)
        expert = torch.where(mine, plan.expert, -1)
        counts = torch.zeros_like(plan.counts) + share
        plans.append(replace(plan, expert=expert, token=token.flatten(), slot=slot, counts=counts, capacity=share))
        first += share
    return plans


class _Trial:
    """The degrees one after the other, each for some steps; then the best, agreed by all ranks."""

    DEGREES, ROUNDS = (1, 2, 4), 3  # the first round of each warms up and does not count

    def __init__(self) -> None:
        self.step, self.began, self.chosen = -1, 0.0, 0
        self.best = [inf] * len(self.DEGREES)  # seconds
        self.new_step = True

    def degree(self, device: torch.device, groups: tuple[ProcessGroup, ...]) -> int:
        """The degree of the trip that begins now; called the same number of times on all ranks."""
        if not self.chosen and self.new_step and not in_backward():  # a recomputed forward is of the same step
            self._advance(device, groups)
        return self.chosen or self.DEGREES[self.step // self.ROUNDS]

    def watch(self, y: Tensor) -> None:
        """The first trip after y's backward begins another step."""
        if not self.chosen and y.requires_grad:
            y.register_hook(self._after_backward)

    def _after_backward(self, grad: Tensor) -> None:
        self.new_step = True

    def _advance(self, device: torch.device, groups: tuple[ProcessGroup, ...]) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if self.step >= 0 and self.step % self.ROUNDS:
            tried = self.step // self.ROUNDS
            self.best[tried] = min(self.best[tried], now - self.began)
        self.step, self.began, self.new_step = self.step + 1, now, False
        if self.step == self.ROUNDS * len(self.DEGREES):
            slowest = torch.tensor(self.best, dtype=torch.float64, device=device)
            for group in groups:  # one after the other they reach all ranks
                dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
            seconds = slowest.tolist()
            self.chosen = self.DEGREES[seconds.index(min(seconds))]
