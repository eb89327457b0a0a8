"""Measurement of time, memory and kernel launches for gpu.py, on a GPU or on a CPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from gpu_report import Row, failure
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]


@dataclass
class Step:
    """One forward, or forward and backward. Gradients are None before it, so that none are added up."""

    forward: Callable[[Tensor], Tensor]
    x: Tensor
    grad: Tensor | None  # None: forward only, without a graph
    parameters: Sequence[Tensor]

    def __call__(self) -> None:
        if self.grad is None:
            with torch.no_grad():
                self.forward(self.x)
            return
        self.clear()
        self.forward(self.x).backward(self.grad)

    def clear(self) -> None:
        for tensor in (self.x, *self.parameters):
            tensor.grad = None

    def complete(self) -> None:
        """Raise a RuntimeError unless every parameter gets a gradient: no contender may skip work."""
        self()
        missing = sum(p.grad is None for p in self.parameters)
        if self.grad is not None and missing:
            raise RuntimeError(f"{missing} of {len(self.parameters)} parameters got no gradient")


@dataclass
class Clock:
    """Measures medians over rounds in which all runs alternate.

    On a GPU, times are between CUDA events. Before each run a buffer of four times the L2 cache is read, so that no
    input is in the cache. With `queued` the device waits until the host has enqueued the whole run, which gives the
    device's own time. Without it, the slower of host and device counts.
    """

    device: torch.device
    seconds: float  # time for one set of runs
    _buffer: Tensor | None = field(default=None, repr=False)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def measure(self, runs: dict[str, Run], queued: bool = False) -> dict[str, float | str]:
        """Median seconds of each run, or the text of its error. If one fails, the others continue."""
        lasts: dict[str, float] = {}
        result: dict[str, float | str] = {}
        for name, run in runs.items():
            try:
                run()  # warm-up: compiles, tunes, fills the allocator's cache
                run()
                self.wait()
                start = time.perf_counter()
                run()
                self.wait()
                lasts[name] = time.perf_counter() - start
            except Exception as error:
                result[name] = failure(error)
        samples: dict[str, list[Callable[[], float]]] = {name: [] for name in lasts}
        round_seconds = max(sum(lasts.values()) * (3 if queued else 1), 1e-6)
        for _ in range(min(max(int(self.seconds / round_seconds), 3), 100)):
            for name in lasts:
                if name not in result:
                    try:
                        samples[name].append(self._once(runs[name], lasts[name] if queued else 0))
                    except Exception as error:
                        result[name] = failure(error)
        self.wait()
        medians = {name: statistics.median(read() for read in samples[name]) for name in lasts if name not in result}
        return {name: medians.get(name, result.get(name, "")) for name in runs}

    def _once(self, run: Run, hold: float) -> Callable[[], float]:
        if not self.cuda:
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            return lambda: seconds
        if self._buffer is None:
            self._buffer = torch.zeros(torch.cuda.get_device_properties(self.device).L2_cache_size, device=self.device)
        self._buffer.sum()  # float32, so four times the cache's bytes; a read leaves no dirty cache lines
        if hold:
            torch.cuda._sleep(int(2e9 * min(2 * hold, 0.02)))  # cycles, at 2 GHz
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        run()
        after.record()
        return lambda: before.elapsed_time(after) / 1e3

    def peak(self, step: Step) -> float | None:
        """Peak memory of a step in MiB, above the memory before it, with gradients; None on a CPU."""
        if not self.cuda:
            return None
        step.clear()
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step()
        self.wait()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20

    def kernels(self, run: Run, times: int = 1) -> list[Row]:
        """Kernels (on a CPU: operators) of a run, with calls and ms per run, longest first; a mean of several runs."""
        run()
        self.wait()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
        with profile(activities=activities, acc_events=True) as profiler:
            for _ in range(times):
                run()
            self.wait()
        kind = torch.autograd.DeviceType.CUDA if self.cuda else torch.autograd.DeviceType.CPU
        totals: dict[str, list[float]] = {}
        for event in profiler.events():
            if event.device_type == kind and not getattr(event, "is_user_annotation", False):
                total = totals.setdefault(event.name, [0, 0])
                total[0] += 1 / times
                spent = event.time_range.elapsed_us() if self.cuda else event.self_cpu_time_total
                total[1] += spent / times / 1e3
        rows = [{"kernel": name, "calls": calls, "ms": ms} for name, (calls, ms) in totals.items()]
        return sorted(rows, key=lambda row: -row["ms"])

    def launches(self, run: Run) -> int | str:
        """Number of kernels and copies that one run launches; on a CPU, of operators."""
        try:
            return round(sum(row["calls"] for row in self.kernels(run)))
        except Exception as error:
            return failure(error)

    def host_us(self, run: Run) -> float:
        """Microseconds until the host has enqueued a run."""
        taken = []
        for _ in range(12):
            self.wait()
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        self.wait()
        return statistics.median(taken[2:]) * 1e6


def fresh(device: torch.device) -> bool:
    """Free memory between cases. False if the device fails, as after an illegal memory access."""
    gc.collect()
    with suppress(Exception):
        torch.ones(8, device=device).sum().item()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return True
    return False
