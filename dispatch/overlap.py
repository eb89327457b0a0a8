"""Overlap of communication and compute: rows of one chunk of the batch travel while the experts compute another.

The idea is in FasterMoE's smart schedule (doi:10.1145/3503221.3508418) and in Tutel's adaptive pipelining
(arXiv:2206.03382). Here autograd runs the backward, which overlaps as well: see `interleave`.
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
from .row_blocks import shares
from .steps import Beside, Ready, Steps, announce_all, interleave, prepare, refuse_all
from .torch_internals import in_backward
from .traced import outside


@dataclass(frozen=True)
class OverlapDispatcher(Dispatcher):
    """Runs another dispatcher in `degree` chunks that overlap with the experts, in forward and backward.

    Results equal the results of `inner` up to rounding, because experts see the same rows in smaller batches. The same
    assignments are dropped, because capacity is applied before. Every rank makes `degree` chunks whatever its number of
    tokens, and empty chunks take part. All chunks exchange their sizes and notes together, before any row is sent. So
    nothing waits for the host afterwards.

    A ragged plan is cut by tokens. A padded plan is cut by rows: each chunk has a part of every expert's capacity, so
    that as many rows are sent as without chunks. Cut by tokens, each chunk might need the whole capacity.

    Args:
        inner: the dispatcher of each chunk. It overlaps if it is a `SteppedDispatcher`, as all of this package are. Any
            other dispatcher works too, one chunk after the other.
        degree: number of chunks, the same on all ranks. ``"auto"`` tries 1, 2 and 4 for three training steps each, and
            keeps the one that is fastest on the slowest rank. Every 500 steps it tries them again, and changes if
            another one is 5 % faster. A step lasts from the first forward to the first forward after its backward,
            optimizer included. These times are the dispatcher's only state. Give a number for pipeline schedules (1F1B)
            with activation checkpointing: a recomputed forward must have as many chunks as the first one.

    Raises:
        ValueError: `degree` is no positive integer and not ``"auto"``.

    References:
        FasterMoE, He et al. 2022, doi:10.1145/3503221.3508418. Tutel, Hwang et al. 2022, arXiv:2206.03382.

    Examples:
        On the ranks of a mesh with axis "ep"::

            layer.dispatcher = OverlapDispatcher(FlatDispatcher(mesh.get_group("ep")), degree=2)
    """

    inner: Dispatcher
    degree: int | Literal["auto"]
    _trial: _Trial = field(default_factory=lambda: _Trial(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.degree != "auto" and (not isinstance(self.degree, int) or self.degree < 1):
            raise ValueError(f'degree must be a positive integer or "auto"; got {self.degree!r}')

    def __call__(self, x: Tensor, plan: Plan, weight: Tensor, experts: Experts, beside: Beside | None = None) -> Tensor:
        """Dispatch, experts and combine, with chunks interleaved: x [T, D] -> y [T, D]."""
        if torch.compiler.is_compiling():
            return outside(self, x, plan, weight, experts)
        degree = self._degree_now(x.device)
        if degree == 1:
            y = self.inner(x, plan, weight, experts, beside)
        else:
            plan = plan.started(degree)
            xs, plans, weights = _cut(x, plan, weight, degree)
            chunks = [self._chunk(*chunk, experts) for chunk in zip(xs, plans, weights, strict=True)]
            prepare(chunks, plan.call)
            ys = interleave(chunks, plan.call, beside)
            y = torch.cat(ys) if plan.capacity is None else torch.stack(ys).sum(0)
        if self.degree == "auto":
            self._trial.watch(y)
        return y

    def announce(self, x: Tensor, plan: Plan, weight: Tensor) -> Ready:
        """Announce each chunk that other ranks would send, and add up their rows."""
        degree = self._degree_now(x.device)
        if degree == 1:
            return self.inner.announce(x, plan, weight)
        plan = plan.started(degree)
        chunks = zip(*_cut(x, plan, weight, degree), strict=True)
        every = announce_all([self.inner.dispatch_steps(*chunk) for chunk in chunks], plan.call)
        if any(ready.counts is None for ready in every):
            return Ready()
        counts = torch.cat([ready.counts for ready in every if ready.counts is not None])
        return Ready(counts, sum(ready.rows for ready in every), sum(ready.most for ready in every))

    def dispatch(self, x: Tensor, plan: Plan, weight: Tensor) -> Batch:
        """Dispatch of `inner`, without chunks."""
        return self.inner.dispatch(x, plan, weight)

    def combine(self, rows: Tensor, receipt: Any) -> Tensor:
        """Combine of `inner`, without chunks."""
        return self.inner.combine(rows, receipt)

    def refuse(self, num_experts: int, device: torch.device, place: Place | None = None) -> None:
        """Refuse every chunk that the other ranks are about to send."""
        refusals = [self.inner.refuse_steps(num_experts, device) for _ in range(self._degree_now(device))]
        refuse_all(refusals, None if place is None else place.start_call())

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """The groups of `inner`."""
        return self.inner.groups

    def _chunk(self, x: Tensor, plan: Plan, weight: Tensor, experts: Experts) -> Steps[Tensor]:
        batch = yield from self.inner.dispatch_steps(x, plan, weight)
        rows = experts(batch.rows, batch.weight, batch.counts)
        return (yield from self.inner.combine_steps(rows, batch.receipt))

    def _degree_now(self, device: torch.device) -> int:
        return self._trial.degree(device, self.groups) if self.degree == "auto" else self.degree


def _cut(x: Tensor, plan: Plan, weight: Tensor, degree: int) -> tuple[tuple[Tensor, ...], list[Plan], tuple]:
    """Tokens, plans and weights of each chunk."""
    if plan.capacity is not None:
        return (x,) * degree, [plan.part(i, degree) for i in range(degree)], (weight,) * degree
    sizes = shares(x.shape[0], degree)
    whole = [Plan.of(expert, plan.counts.numel(), place=plan.place) for expert in plan.expert.split(sizes)]
    plans = [replace(part, call=plan.call) for part in whole]
    return x.split(sizes), plans, weight.split(sizes)


class _Trial:
    """Times each degree for some steps, and keeps the fastest one, on which all ranks agree. Later it tries again."""

    DEGREES, ROUNDS = (1, 2, 4), 3  # the first round of each degree is a warm-up
    AGAIN, GAIN = 500, 0.05  # steps from trial to trial; what another degree must save, so that noise changes nothing

    def __init__(self) -> None:
        self.step, self.began, self.chosen = -1, 0.0, 0
        self.best = [inf] * len(self.DEGREES)  # seconds
        self.new_step = True

    @property
    def tries(self) -> bool:
        """Whether this step belongs to a trial."""
        return self.step < self.ROUNDS * len(self.DEGREES)

    def degree(self, device: torch.device, groups: tuple[ProcessGroup, ...]) -> int:
        """Degree of the forward that starts now. All ranks must call it equally often."""
        if self.new_step and not in_backward():  # a recomputed forward belongs to the same step
            self._advance(device, groups)
        return self.DEGREES[self.step // self.ROUNDS] if self.tries else self.chosen

    def watch(self, y: Tensor) -> None:
        """Start a new step with the first forward after the backward of y."""
        if y.requires_grad:
            y.register_hook(self._after_backward)

    def _after_backward(self, grad: Tensor) -> None:
        self.new_step = True

    def _advance(self, device: torch.device, groups: tuple[ProcessGroup, ...]) -> None:
        timed, self.step, self.new_step = self.step if self.tries else -1, self.step + 1, False
        if self.step == self.AGAIN:
            self.step, self.best = 0, [inf] * len(self.DEGREES)
        if not self.tries and timed < 0:
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if timed >= 0 and timed % self.ROUNDS:
            tried = timed // self.ROUNDS
            self.best[tried] = min(self.best[tried], now - self.began)
        self.began = now
        if not self.tries:
            self._choose(device, groups)

    def _choose(self, device: torch.device, groups: tuple[ProcessGroup, ...]) -> None:
        slowest = torch.tensor(self.best, dtype=torch.float64, device=device)
        for group in groups:  # reductions over all groups in turn reach all ranks
            dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
        seconds = dict(zip(self.DEGREES, slowest.tolist(), strict=True))
        fastest = min(seconds, key=lambda degree: seconds[degree])
        if not self.chosen or seconds[fastest] < (1 - self.GAIN) * seconds[self.chosen]:
            self.chosen = fastest
