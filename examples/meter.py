"""Meter of a job: tokens and FLOPs per second, MFU, peak memory, and bytes sent between ranks."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from objective import flops_per_token
from traffic import KINDS, Traffic, axes_of
from turnout.dispatch import Meshes
from turnout.models.pipeline.partition import Config, model_of


class Meter:
    """Measures training steps that run in `with meter.step():`.

    Args:
        config: sizes of the model. FLOPs are those of `GPT.flops_per_token` and the like, without recomputation.
        meshes: meshes of the job, to count bytes by axis.
        tokens: number of tokens in a step, on all ranks together.
        peak_tflops: peak TFLOP/s of one device; 0: unknown.
        device: device of this rank.
    """

    def __init__(self, config: Config, meshes: Meshes, tokens: int, peak_tflops: float, device: torch.device):
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = model_of(config)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.active_parameters = model.active_parameters()
        self.flops, self.tokens, self.peak, self.device = flops_per_token(model), tokens, peak_tflops, device
        self.names = axes_of(meshes)
        self.sent: dict[str, int] = {}  # bytes that this rank sent in the last counted step
        self.seconds, self.steps = 0.0, 0  # of the timed steps, those that were not counted
        self._before = 0.0, 0

    @contextmanager
    def step(self, count: bool) -> Iterator[None]:
        """Context of a training step. It counts bytes or takes the time, never both: counting slows the step."""
        start = time.perf_counter()
        with Traffic(self.names) if count else nullcontext() as traffic:
            yield
        if traffic is None:
            self.seconds, self.steps = self.seconds + time.perf_counter() - start, self.steps + 1
        else:
            self.sent = {f"{axis} {kind}": n for (axis, kind), n in traffic.sent.items()}

    def read(self) -> dict[str, Any]:
        """Values of the steps since the last call, the same on all ranks. All ranks call it.

        ``tokens_per_s`` and ``tflops_per_s`` are sums over ranks. ``mfu``, if the peak is known, is the share of the
        peak. ``memory_bytes`` is the maximum over ranks since the job started, allocated on a GPU or resident on a CPU.
        ``sent_bytes`` has the bytes of one step by axis and collective, as means over ranks.
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
        """Tokens and FLOPs per second of all steps so far, or of the given ones; None if there are no steps."""
        seconds, steps = self.seconds if seconds is None else seconds, self.steps if steps is None else steps
        rate = steps * self.tokens / seconds if steps else None
        tflops = rate and rate * self.flops / 1e12
        rates = {"tokens_per_s": rate and round(rate), "tflops_per_s": tflops}
        if self.peak:
            rates["mfu"] = tflops and tflops / (self.peak * dist.get_world_size())
        return rates

    def _wait(self) -> None:
        """Wait for the GPU, which may still run steps, and add the time."""
        start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of tensors on a GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def usage_line(usage: dict[str, Any]) -> str:
    """One line of text for the values of `Meter.read`."""
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
