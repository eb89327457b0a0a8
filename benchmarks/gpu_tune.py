"""Speed of the experts' Triton kernels for each tile size that `autotune` tries, and of the tuned layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from gpu_clock import Clock
from gpu_layer import SHAPES, SMALL, Case, Shape, judged, kernels
from gpu_report import Row
from turnout.cuda import tune
from turnout.moe.autotune import autotune

KERNELS = ("up", "down", "hidden", "weight")


def cases(clock: Clock, small: bool) -> dict[str, Callable[[], list[Row]]]:
    """Tile sizes first, with a case for each kernel, so that a kernel that hangs loses no other results."""
    named: dict[str, Callable[[], list[Row]]] = {}
    shapes = SMALL if small else SHAPES
    if "triton" in kernels(clock.device):
        named |= {
            f"tiles {shape}, {kernel}": partial(tiles, clock, shape, kernel) for shape in shapes for kernel in KERNELS
        }
    return named | {f"layer {shape}, tuned": partial(tuned, clock, shape) for shape in shapes}


def tiles(clock: Clock, shape: Shape, kernel: str) -> list[Row]:
    """Device time of a kernel for each tile size. The sizes of `turnout.cuda.tiles.sizes` come first."""
    T, D, H, E, k = shape
    experts = tune.Shape(T, D, H, E, k, activation="swiglu", bias=False, dtype="bfloat16", gathers=True, gated=True)
    rows: list[Row] = []
    for product, runs in tune.attempts(experts, clock.device, kernel).items():
        times = clock.measure({", ".join(map(str, size)): run for size, run in runs.items()}, queued=True)
        # "up" multiplies by two matrices; "down" by one, and by two in the backward
        matrices = {"up": 2, "down": 3, "hidden": 1, "weight": 1 if product.shape == (H, D) else 2}[kernel]
        best = min((t for t in times.values() if isinstance(t, float)), default=None)
        for size, seconds in times.items():
            row: Row = {"T, D, H, E, k": ", ".join(map(str, shape)), "what": f"{kernel} {product.shape}", "tiles": size}
            if isinstance(seconds, str):
                row["failed"] = seconds
            else:
                row |= {"ms": seconds * 1e3, "TFLOP/s": 2 * matrices * T * k * D * H / 1e12 / seconds}
                row["of the fastest"] = seconds / best if best else None
            rows.append(row)
    return rows


def tuned(clock: Clock, shape: Shape) -> list[Row]:
    """Kernel that `autotune` chooses, and times of the tuned layer and of the dense MLP."""
    case = Case(clock, *shape)
    (said,) = autotune(case.layer, shape[0]).experts
    row: Row = {"T, D, H, E, k": ", ".join(map(str, shape)), "what": "autotune", "kernel": said.kernel, "why": said.why}
    row |= {f"fwd+bwd ms, {kernel}": ms for kernel, ms in said.times.items()}
    build = {"dense": case.dense}
    build |= {
        f"layer, {kernel}{', tuned' * (kernel == 'triton')}": partial(case.ours, kernel)
        for kernel in kernels(clock.device)
    }
    return [row, *judged(clock, case.against(build))]
