"""How much of the all-to-all is hidden behind the experts, with 1, 2 and 4 chunks? Forward and backward.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4 benchmarks/overlap.py --png overlap.png

An exchange lasts from the call that starts it to the callback of its completion. Experts last from their first to their
last operation. `travel` is the time in which an exchange runs on this rank, including waits for slower ranks. `hidden`
is the part of it in which experts compute. `step` is dispatch, experts and combine, forward and backward. Rounds of all
numbers of chunks alternate. Table and picture show rank 0's median round. Ranks of one machine share its cores with
gloo. With fewer cores than ranks, an overlapped exchange takes time from the experts of other ranks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from turnout.dispatch import FlatDispatcher, OverlapDispatcher, Plan
from turnout.moe.experts.feed_forward import FeedForwardExperts

E, K = 8, 2
DEGREES = (1, 2, 4)


class Span(NamedTuple):
    what: str  # "travel" or "experts"
    start: float
    end: float


class Recorder:
    """Context that records the spans of one round: all-to-alls of rows, and experts in forward and backward."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.lock, self.under_way = threading.Lock(), 0
        self.exchange = dist.all_to_all_single

    def __enter__(self) -> Recorder:
        dist.all_to_all_single = self._exchange
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self.end = time.perf_counter()
        dist.all_to_all_single = self.exchange
        while self.under_way:  # callbacks run in threads of gloo
            time.sleep(1e-4)

    def _exchange(self, *args, **kwargs):
        start = time.perf_counter()
        work = self.exchange(*args, **kwargs)
        if work is not None:
            with self.lock:
                self.under_way += 1
            work.get_future().add_done_callback(lambda _: self._done(start))
        return work

    def _done(self, start: float) -> None:
        with self.lock:
            self.spans.append(Span("travel", start, time.perf_counter()))
            self.under_way -= 1

    def experts(self, experts: FeedForwardExperts):
        def run(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
            backward = [0.0]
            rows = Mark.apply(rows, lambda: self.spans.append(Span("experts", backward[0], time.perf_counter())))
            start = time.perf_counter()
            out = experts(rows, weight, counts)
            self.spans.append(Span("experts", start, time.perf_counter()))
            return Mark.apply(out, lambda: backward.__setitem__(0, time.perf_counter()))

        return run


class Mark(torch.autograd.Function):
    """Return x unchanged, and call `note` when its gradient is computed."""

    @staticmethod
    def forward(ctx, x, note):
        ctx.note = note
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.note()
        return grad, None


def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Merge spans that overlap."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def common(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    return sum(max(0.0, min(x[1], y[1]) - max(x[0], y[0])) for x in a for y in b)


def measure(args) -> dict[int, list[Recorder]]:
    torch.manual_seed(dist.get_rank())
    experts = FeedForwardExperts(args.dim, args.hidden, E // dist.get_world_size(), "gelu")
    x = torch.randn(args.tokens, args.dim, requires_grad=True)
    plan = Plan.of(torch.rand(args.tokens, E).argsort(1)[:, :K].contiguous(), E)
    weight, grad = torch.rand(args.tokens, K), torch.randn(args.tokens, args.dim)
    rounds: dict[int, list[Recorder]] = {degree: [] for degree in DEGREES}
    for _ in range(args.rounds + 2):
        for degree in DEGREES:
            dispatcher = OverlapDispatcher(FlatDispatcher(dist.group.WORLD), degree)
            experts.zero_grad()
            x.grad = None
            dist.barrier()
            with Recorder() as recorder:
                dispatcher(x, plan, weight, recorder.experts(experts)).backward(grad)
            rounds[degree].append(recorder)
    return {degree: sorted(r[2:], key=lambda one: one.end - one.start) for degree, r in rounds.items()}


def shares(recorder: Recorder) -> tuple[float, float, float, float]:
    """Seconds of step, travel, experts and hidden travel in a round."""
    travel, busy = (union([s[1:] for s in recorder.spans if s.what == what]) for what in ("travel", "experts"))
    length = [sum(end - start for start, end in spans) for spans in (travel, busy)]
    return recorder.end - recorder.start, *length, common(travel, busy)


def draw(rounds: dict[int, Recorder], path: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rounds), 1, sharex=True, figsize=(9, 1.4 * len(rounds) + 0.8), layout="constrained")
    for axis, (degree, one) in zip(axes, rounds.items(), strict=True):
        for row, (what, colour) in enumerate({"experts": "tab:orange", "travel": "tab:blue"}.items()):
            bars = [((s.start - one.start) * 1e3, (s.end - s.start) * 1e3) for s in one.spans if s.what == what]
            axis.broken_barh(bars, (row - 0.35, 0.7), facecolors=colour, edgecolor="white", alpha=0.7)
        axis.set_yticks([0, 1], ["experts", "travel"])
        axis.set_title(f"{degree} chunk{'s' * (degree > 1)}", loc="left", fontsize=9)
    axes[-1].set_xlabel("ms, forward and backward on rank 0")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="number of tokens on each rank")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--png", help="file for a picture of the timeline")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rounds = measure(args)
    if dist.get_rank() == 0:
        sizes = f"T={args.tokens} D={args.dim} H={args.hidden} E={E} k={K}, {args.rounds} rounds"
        print(f"torch {torch.__version__}, {dist.get_world_size()} ranks on {os.cpu_count()} cores, gloo, {sizes}\n")
        print("| chunks | step ms, median (fastest) | travel ms | experts ms | travel hidden |\n|---|---|---|---|---|")
        for degree, ordered in rounds.items():
            _, travel, busy, hidden = (statistics.median(s) * 1e3 for s in zip(*map(shares, ordered), strict=True))
            steps = [one.end - one.start for one in ordered]
            step = f"{statistics.median(steps) * 1e3:.0f} ({steps[0] * 1e3:.0f})"
            print(f"| {degree} | {step} | {travel:.0f} | {busy:.0f} | {hidden:.0f} ms, {hidden / travel:.0%} |")
        if args.png:
            draw({degree: ordered[len(ordered) // 2] for degree, ordered in rounds.items()}, args.png)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
