"""How fast a job is, how much memory it takes and what its ranks send each other."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from traffic import KINDS, Traffic, axes_of
from turnout.dispatch import Meshes
from turnout.models import GPT, GPTConfig


class Meter:
    """Times training steps, in `with meter.step():`, and tells what they took.

    Args:
        config: of the model; the FLOPs of a token are its `GPT.flops_per_token`, whatever is computed twice or not.
        meshes: axes by which traffic is told apart.
        tokens: in a step, on all ranks together.
        peak_tflops: of one device; 0: unknown.
    """

    def __init__(self, config: GPTConfig, meshes: Meshes, tokens: int, peak_tflops: float, device: torch.device):
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = GPT(config)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.active_parameters = model.active_parameters()
        self.flops, self.tokens, self.peak, self.device = model.flops_per_token(), tokens, peak_tflops, device
        self.names = axes_of(meshes)
        self.sent: dict[str, int] = {}  # by this rank, in the step counted last
        self.seconds, self.steps = 0.0, 0  # of steps that were not counted
        self._before = 0.0, 0

    @contextmanager
    def step(self, count: bool) -> Iterator[None]:
        """Around a training step. What it sends is counted or its time taken: counting costs time."""
        start = time.perf_counter()
        with Traffic(self.names) if count else nullcontext() as traffic:
            yield
        if traffic is None:
            self.seconds, self.steps = self.seconds + time.perf_counter() - start, self.steps + 1
        else:
            self.sent = {f"{axis} {kind}": n for (axis, kind), n in traffic.sent.items()}

    def read(self) -> dict[str, Any]:
        """Of the steps since it was last read, in JSON's types; the same on all ranks, which all call it.

        ``tokens_per_s`` and ``tflops_per_s`` are of all ranks together; ``mfu`` (with a peak) is their share of it;
        ``memory_bytes`` the most of any rank, since the job began: allocated on a GPU, resident on a CPU;
        ``sent_bytes`` by axis and collective, in a step, the mean over ranks.
        """
        self._wait()
        seconds, steps = self.seconds - self._before[0], self.steps - self._before[1]
        self._before = self.seconds, self.steps
        most = torch.tensor(float(peak_memory(self.device)), dtype=torch.float64)
        keys = [f"{axis} {kind}" for axis in [*sorted(set(self.names.values())), "other"] for kind in KINDS]
        sent = torch.tensor([self.sent.get(key, 0) for key in keys], dtype=torch.float64)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        dist.all_reduce(sent)
        mean = {key: round(n / dist.get_world_size()) for key, n in zip(keys, sent.tolist(), strict=True) if n}
        return {**self.rates(seconds, steps), "memory_bytes": int(most), "sent_bytes": mean}

    def rates(self, seconds: float | None = None, steps: int | None = None) -> dict[str, Any]:
        """Tokens and FLOPs per second, of all steps so far if no others are given; None before there are any."""
        seconds, steps = self.seconds if seconds is None else seconds, self.steps if steps is None else steps
        rate = steps * self.tokens / seconds if steps else None
        tflops = rate and rate * self.flops / 1e12
        rates = {"tokens_per_s": rate and round(rate), "tflops_per_s": tflops}
        if self.peak:
            rates["mfu"] = tflops and tflops / (self.peak * dist.get_world_size())
        return rates

    def _wait(self) -> None:
        """A GPU may still be at work on steps whose time was taken."""
        start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, or the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def told(usage: dict[str, Any]) -> str:
    """A line of what `Meter.read` returned."""
    words = []
    if usage["tokens_per_s"]:
        words.append(f"{usage['tokens_per_s']} tokens/s")
        share = f" ({usage['mfu']:.1%} MFU)" if "mfu" in usage else ""
        words.append(f"{usage['tflops_per_s']:.3g} TFLOP/s{share}")
    words.append(f"{usage['memory_bytes'] / 1e9:.2f} GB")
    axes: dict[str, int] = {}
    for key, n in usage["sent_bytes"].items():
        axis = key.partition(" ")[0]
        axes[axis] = axes.get(axis, 0) + n
    words += [f"{axis} {n / 1e6:.3g} MB/step" for axis, n in axes.items()]
    return ", ".join(words)
