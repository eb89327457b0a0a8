"""How large is the bubble of each pipeline schedule, and how many activations do ranks hold? Against theory.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4 benchmarks/pipeline.py --png pipeline.png

With ``--work sleep`` a block sleeps equally long for its forward, the gradient of its input, and the gradient of its
weights. Ranks that share cores then wait for each other as ranks with their own devices do. So the order of work is
measured, and the cost of sending. ``--work real`` computes.

Spans are from call to return of a stage's forward and backward, on the machine's monotonic clock. The bubble is the
time of a step over all ranks, divided by a rank's mean busy time, minus one (arXiv:2104.04473, section 2.2). The step
of the smallest bubble is shown. Memory is what autograd holds in a step of real blocks, without parameters. Its unit is
the activations of one micro-batch, and the rank with the most memory counts.
"""

from __future__ import annotations

import argparse
import time
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from turnout.models import GPTConfig
from turnout.models.pipeline.engine import Pipeline
from turnout.models.pipeline.partition import PER_RANK, Stages

CONFIG = GPTConfig(vocab=32, dim=32, layers=8, heads=4, hidden=32, seq_len=32, moe_every=0)
COLOURS = {"F": "#4878cf", "B": "#ee854a", "I": "#ee854a", "W": "#6acc65"}
METHODS = {"forward_one_chunk": "F", "backward_one_chunk": "B", "backward_weight_one_chunk": "W"}


@dataclass(frozen=True)
class Span:
    kind: str  # F forward, B backward, or its halves: I gradients of inputs, W gradients of weights
    stage: int
    micro_batch: int
    start: float
    end: float


class Pause(torch.autograd.Function):
    """Return x unchanged. The backward sleeps for `seconds`."""

    @staticmethod
    def forward(ctx, x: Tensor, seconds: float):
        ctx.seconds = seconds
        return x.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        time.sleep(ctx.seconds)
        return grad, None


class Sleeper(nn.Module):
    """Block whose forward, gradient of the input and gradient of the weight take equally long."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight, self.seconds = nn.Parameter(torch.ones(())), seconds

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        time.sleep(self.seconds)
        return Pause.apply(x, self.seconds) * Pause.apply(self.weight, self.seconds)


class Clock:
    """Records the spans of the stages on this rank."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        for name, kind in METHODS.items():
            setattr(PipelineStage, name, self._timed(getattr(PipelineStage, name), kind))

    def _timed(self, method, kind: str):
        def timed(stage, micro_batch, *args, **options):
            start = time.perf_counter()
            result = method(stage, micro_batch, *args, **options)
            short = "I" if not options.get("full_backward", True) else kind
            self.spans.append(Span(short, stage.stage_index, micro_batch, start, time.perf_counter()))
            return result

        return timed


class Saved:
    """Counts bytes that autograd saves for the backward: held now, held at most, and saved in all."""

    def __init__(self) -> None:
        self.now = self.most = self.taken = 0

    def watch(self):
        return torch.autograd.graph.saved_tensors_hooks(self._keep, lambda box: box[0])

    def _keep(self, x: Tensor):
        # detached: an operation's output refers to its graph, and half a backward does not break that cycle
        box = _Box([x.detach()])
        if not isinstance(x, nn.Parameter):
            self.now, self.taken = self.now + x.nbytes, self.taken + x.nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(box, self._free, x.nbytes)
        return box

    def _free(self, size: int) -> None:
        self.now -= size


class _Box(list):
    """List that allows weak references."""

    __hash__ = object.__hash__


def build(schedule: str, micro_batches: int, seconds: float | None) -> Pipeline:
    torch.manual_seed(0)
    stages = Stages.of(CONFIG, schedule, dist.get_world_size())
    if seconds is not None and len({len(blocks) for blocks in stages.blocks}) > 1:
        raise ValueError(f"{CONFIG.layers} sleeping blocks do not split evenly over {len(stages.blocks)} stages")
    parts = stages.build(dist.get_rank())
    for part, index in zip(parts, stages.of_rank(dist.get_rank()), strict=True):
        for block in stages.blocks[index] if seconds is not None else ():
            part.blocks[block] = Sleeper(seconds)
    return Pipeline(parts, stages, dist.group.WORLD, micro_batches)


def timed(schedule: str, micro_batches: int, seconds: float | None, clock: Clock, steps: int) -> tuple[float, list]:
    """Run some steps, and return (bubble, spans of each rank) of the step with the smallest bubble."""
    pipeline = build(schedule, micro_batches, seconds)
    tokens = torch.zeros(4 * micro_batches, CONFIG.seq_len, dtype=torch.int64)
    found = []
    for step in range(steps + 1):  # the first one sets up connections, and does not count
        dist.barrier()
        clock.spans.clear()
        pipeline.step(tokens, tokens)
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, list(clock.spans))
        spans = [span for mine in everyones for span in mine]
        whole = max(span.end for span in spans) - min(span.start for span in spans)
        busy = sum(span.end - span.start for span in spans) / len(everyones)
        if step:
            found.append((whole / busy - 1, everyones))
    return min(found, key=lambda one: one[0])


def held(schedule: str, micro_batches: int) -> float:
    """Most activations that a rank holds for the backward, in units of one micro-batch."""
    pipeline, saved = build(schedule, micro_batches, None), Saved()
    tokens = torch.zeros(4 * micro_batches, CONFIG.seq_len, dtype=torch.int64)
    with saved.watch():
        pipeline.step(tokens, tokens)
    most = torch.tensor(saved.most * micro_batches / saved.taken)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most)


def theory(schedule: str, p: int, v: int, m: int) -> tuple[float, float]:
    """Theoretical (bubble, micro-batches held) if forward and both halves of backward take equally long."""
    return {
        "gpipe": ((p - 1) / m, m),
        "1f1b": ((p - 1) / m, min(m, p)),
        "interleaved1f1b": ((p - 1) / (m * v), min(m, p + (p - 1) / v)),
        "interleaved_zb": ((p - 1) / (3 * m * v), min(m, p)),
        "zbv": (0, min(m, p)),
    }[schedule]


def draw(path: str, shown: dict[str, list[list[Span]]], p: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    figure, axes = plt.subplots(len(shown), 1, figsize=(12, 1.5 * len(shown) + 0.6), sharex=True, layout="constrained")
    for axis, (schedule, ranks) in zip(axes, shown.items(), strict=True):
        start = min(span.start for spans in ranks for span in spans)
        for rank, spans in enumerate(ranks):
            for span in spans:
                x, width = span.start - start, span.end - span.start
                later = span.stage >= p  # the second stage on the rank
                axis.barh(rank, width, 0.9, x, color=COLOURS[span.kind], alpha=0.55 if later else 1, ec="white", lw=0.5)
                if width > 0.01:
                    axis.text(x + width / 2, rank, str(span.micro_batch), ha="center", va="center", fontsize=6)
        axis.set_title(schedule, fontsize=9, loc="left")
        axis.set_yticks(range(p), [f"rank {rank}" for rank in range(p)], fontsize=7)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("seconds")
    names = {"F": "forward", "B": "backward (of inputs, where W follows)", "W": "backward of weights"}
    patches = [Patch(color=COLOURS[kind], label=name) for kind, name in names.items()]
    patches.append(Patch(color="gray", alpha=0.55, label="pale: the second stage of a rank"))
    figure.legend(handles=patches, ncols=4, loc="outside lower center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=("sleep", "real"), default="sleep")
    parser.add_argument("--milliseconds", type=float, default=20, help="time that a block sleeps, three times a step")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=(4, 8, 16))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--png", help="file for a picture of the timeline with the second --micro-batches, or the only")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    p, clock, shown = dist.get_world_size(), Clock(), {}
    if dist.get_rank() == 0:
        print("| schedule | m | bubble | in theory | micro-batches held | in theory |\n|---|---|---|---|---|---|")
    for schedule, (v, _) in PER_RANK.items():
        for m in args.micro_batches:
            seconds = args.milliseconds / 1e3 if args.work == "sleep" else None
            bubble, ranks = timed(schedule, m, seconds, clock, args.steps)
            kept, (expected, holds) = held(schedule, m), theory(schedule, p, v, m)
            if m == args.micro_batches[:2][-1]:
                shown[schedule] = ranks
            if dist.get_rank() == 0:
                print(f"| {schedule} | {m} | {bubble:.3f} | {expected:.3f} | {kept:.1f} | {holds:.1f} |", flush=True)
    if args.png and dist.get_rank() == 0:
        draw(args.png, shown, p)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
