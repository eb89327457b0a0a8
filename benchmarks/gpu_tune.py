"""Speed of the experts' Triton kernels for each tile size that `autotune` tries, and of the tuned layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from gpu_clock import Clock
from gpu_layer import SHAPES, SMALL, Case, Shape, has_float8, judged
from gpu_report import Row
from turnout.moe.autotune import autotune
from turnout.moe.autotune.results import Tuned


def cases(clock: Clock, small: bool) -> dict[str, Callable[[], list[Row]]]:
    shapes = SMALL if small else SHAPES
    named: dict[str, Callable[[], list[Row]]]
    named = {f"layer {shape}, tuned": partial(tuned, clock, shape) for shape in shapes}
    if has_float8(clock.device):
        named[f"layer {shapes[0]}, fp8, tuned"] = partial(tuned, clock, shapes[0], "fp8")
    return named


def tuned(clock: Clock, shape: Shape, precision: str | None = None) -> list[Row]:
    """Time of the layer with the kernel and tiles that `autotune` chooses, of the dense MLP, and of every tile size."""
    case = Case(clock, *shape)
    case.layer.experts.precision = precision
    (said,) = autotune(case.layer, shape[0]).experts
    sizes = ", ".join(map(str, shape))
    row: Row = {"T, D, H, E, k": sizes, "what": "autotune", "kernel": said.kernel, "why": said.why}
    row |= {f"fwd+bwd ms, {kernel}": ms for kernel, ms in said.times.items()}
    ours, name = partial(case.ours, said.kernel, precision=precision), ", ".join(filter(None, [said.kernel, precision]))
    timed = case.against({"dense": case.dense, f"layer, {name}, tuned": ours})
    return [row, *judged(clock, timed), *tiles(said, shape)]


def tiles(said: Tuned, shape: Shape) -> list[Row]:
    """A row for each tile size of each product. The sizes of `turnout.cuda.tiles.sizes` come first."""
    T, D, H, _, k = shape
    rows: list[Row] = []
    for product, times in said.tiles.items():
        # "up" and "weights" multiply two matrices; "down" one, and two in the backward
        matrices = {"up": 2, "down": 3, "hidden": 1, "weight": 1, "weights": 2}[product.kernel]
        best = min((ms for ms in times.values() if isinstance(ms, float)), default=None)
        for size, ms in times.items():
            row: Row = {"what": f"{product.kernel} {product.shape}", "tiles": ", ".join(map(str, size))}
            rows.append(row)
            if isinstance(ms, str):
                row["failed"] = ms
            elif best is not None:
                row |= {"ms": ms, "TFLOP/s": 2 * matrices * T * k * D * H / 1e9 / ms, "of the fastest": best / ms}
    return rows
