"""``kernel="auto"`` on a GPU: torch's and Triton's kernels are timed at the first training step, the faster is kept."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...cuda.tune import Run, Shape
from ...dispatch.torch_internals import default_store
from ..experts.first_use import apart
from .results import Times, fastest

log = logging.getLogger(__name__)
KERNELS = ("torch", "triton")
ROUNDS = 5
PATIENCE = timedelta(seconds=60)  # for the times of ranks that do not come here
CHOSEN: dict[tuple[Shape, tuple[int, ...]], str] = {}  # what was measured in this process, as `tiles.MEASURED`
Step = Callable[[Shape, torch.device, str], Run]


def faster(
    shape: Shape,
    device: torch.device,
    of: Tensor,
    learns: bool = True,
    step: Step | None = None,
    clock: Callable[[], float] | None = None,
) -> str:
    """The faster kernel for experts of this shape, by a first measurement that is kept for the rest of the process.

    Forward and backward run in turns, on random tensors. Triton's kernels are checked first (`first_use`), and a kernel
    that fails is not chosen. It needs memory for a step of one more layer. The ranks that hold the layer's experts pass
    their times on through torch.distributed's store, not by a collective: a rank that does not come here delays the
    others by a minute at most, and they then choose by the times they have. The slowest rank's time counts.

    Args:
        shape: sizes of the experts. On one rank tokens are counted in powers of two; on many the first step decides.
        device: where the experts are.
        of: a parameter of the experts, whose mesh tells the ranks.
        learns: whether this is a training step. Before the first one, the kernel is "torch".
        step: function (shape, device, kernel) -> run. None, the default, takes that of `autotune`.
        clock: function that returns seconds, after the device has finished. None, the default, waits for it.
    """
    shape = shape._replace(tokens=max(shape.tokens, 1))
    ranks = tuple(of.device_mesh.mesh.flatten().tolist()) if isinstance(of, DTensor) else ()
    many = len(ranks) > 1
    bucket = shape._replace(tokens=1 if many else 1 << (shape.tokens - 1).bit_length())
    if (bucket, ranks) not in CHOSEN:
        if not learns:
            return "torch"
        times = apart(lambda: _timed(shape, device, step, clock or (lambda: _now(device))))
        if many:
            times = _slowest(times, bucket, ranks)
        CHOSEN[bucket, ranks] = kernel = fastest(times) or "torch"
        said = ", ".join(f"{name} {ms}" if isinstance(ms, str) else f"{name} {ms:.3f} ms" for name, ms in times.items())
        log.info('kernel="auto" is "%s" for %s: %s', kernel, shape, said)
    return CHOSEN[bucket, ranks]


def _timed(shape: Shape, device: torch.device, step: Step | None, clock: Callable[[], float]) -> Times[str]:
    """Milliseconds of a step with each kernel, the median of a few rounds, or the error of a kernel."""
    if step is None:
        from .tuning import _step as step  # which imports the layer
    runs: dict[str, Run] = {}
    times: Times[str] = {}
    each: dict[str, list[float]] = {name: [] for name in KERNELS}
    for name in KERNELS:
        try:
            runs[name] = step(shape, device, name)
            runs[name]()  # compiles
        except Exception as error:
            times[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            runs.pop(name, None)
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = clock()
            run()
            each[name].append(1e3 * (clock() - start))
    runs.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {name: times[name] if name in times else statistics.median(each[name]) for name in KERNELS}


def _slowest(own: Times[str], bucket: Shape, ranks: tuple[int, ...]) -> Times[str]:
    """The longest time of each kernel over the ranks, or the error of any."""
    store, key = default_store(), f"turnout/kernel/{tuple(bucket)}/{ranks}"
    store.set(f"{key}/{dist.get_rank()}", json.dumps(own))
    try:
        store.wait([f"{key}/{rank}" for rank in ranks], PATIENCE)
    except RuntimeError as error:  # of any store
        log.warning('kernel="auto" chooses for this rank alone: others of %s have measured nothing. %s', ranks, error)
        return own
    everyones = [json.loads(store.get(f"{key}/{rank}")) for rank in ranks]
    slowest: Times[str] = {}
    for name in KERNELS:
        each = [times[name] for times in everyones]
        slowest[name] = next((ms for ms in each if isinstance(ms, str)), None) or max(each)
    return slowest


def _now(device: torch.device) -> float:
    torch.cuda.synchronize(device)
    return time.perf_counter()
