"""Floor and expected time of each kernel of a training step, by arithmetic from bytes and operations.

    python benchmarks/gpu_floors.py                              # the first shape, on an H100 and an H200
    python benchmarks/gpu_floors.py 16384 2048 1024 64 8
    python benchmarks/gpu_floors.py float8                       # a step with precision="fp8"

The floor is the longer of two times: to move the bytes that must move, and to do the operations. Bytes count each input
once, each output once, and a gathered token once, as if the L2 cache held it. No program reaches the nominal rates, so
a time is expected at 85 % of the bandwidth, at 65 % of the rate of products, and 5 us after the launch.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from gpu_report import Row, table

Shape = tuple[int, int, int, int, int]  # T, D, H, E, k
FIRST: Shape = (32768, 4096, 1536, 128, 8)


class Device(NamedTuple):
    """Nominal rates of a GPU.

    Attributes:
        tb: memory bandwidth in TB/s.
        tflop: dense bfloat16 products in TFLOP/s.
        float8: dense float8 products in TFLOP/s, 0 where there are none.
    """

    tb: float
    tflop: float
    float8: float


DEVICES = {
    "H200": Device(4.8, 989, 1979),
    "H100 PCIe": Device(2.0, 756, 1513),
    "H100": Device(3.35, 989, 1979),
    "A100": Device(2.04, 312, 0),
    "B200": Device(8.0, 2250, 4500),
}
MOVED, MULTIPLIED, LAUNCH_MS = 0.85, 0.65, 0.005  # shares of the nominal rates to expect


class Work(NamedTuple):
    """Work of one kernel, or of adjacent ones.

    Attributes:
        gb: bytes that must move, in 10^9.
        tflop: operations of matrix products, in 10^12.
        float8: whether the products are in float8.
    """

    gb: float
    tflop: float = 0.0
    float8: bool = False

    def floor(self, on: Device) -> float:
        """Milliseconds at nominal rates."""
        return max(self.gb / on.tb, self._products(on))

    def expected(self, on: Device) -> float:
        """Milliseconds at the rates that good kernels reach."""
        return LAUNCH_MS + max(self.gb / on.tb / MOVED, self._products(on) / MULTIPLIED)

    def _products(self, on: Device) -> float:
        return 1e3 * self.tflop / (on.float8 if self.float8 else on.tflop) if self.tflop else 0.0


def device(name: str) -> Device | None:
    """Rates of the GPU with this name, None if they are not known."""
    return next((rates for known, rates in DEVICES.items() if all(word in name for word in known.split())), None)


def works(shape: Shape) -> dict[str, Work]:
    """Work of each kernel of a SwiGLU layer's step in bfloat16 with Triton's kernels, in order."""
    T, D, H, E, k = shape
    R = T * k
    x, rows, hidden, logits = (2 * size / 1e9 for size in (T * D, R * D, R * H, 2 * T * E))
    matrix, router, place = 2 * E * D * H / 1e9, 2 * E * D / 1e9, 8 * R / 1e9  # bytes of int64 [R]
    product, choice = 2 * R * D * H / 1e12, 2 * T * D * E / 1e12
    return {
        "router, product": Work(x + router + logits, choice),
        "router": Work(2 * logits + 1.5 * place),
        "plan": Work(4 * place),
        "up": Work(x + 2 * matrix + 3 * hidden, 2 * product),
        "down": Work(hidden + matrix + rows, product),
        "decode": Work(rows + x + place),
        "hidden, backward": Work(x + matrix + 5 * hidden, product),
        "down, backward": Work(2 * hidden + 2 * matrix + rows, 2 * product),
        "decode of gradients": Work(rows + x + place),
        "weights, backward": Work(x + 2 * hidden + 2 * matrix, 2 * product),
        "weight, backward": Work(x + hidden + matrix, product),
        "router, backward": Work(3 * logits),
        # a float32 gradient counts as three bfloat16 pieces
        "router, product, backward": Work(2 * x + 2 * router + 2 * logits, 6 * choice),
    }


def float8_works(shape: Shape) -> dict[str, Work]:
    """Work of the kernels of such a step with precision="fp8", in order: kernels of `works` that differ, and casts.

    A cast reads 2 bytes and writes 1. Gradients of the weights are products in bfloat16, as before. Scales, 4 bytes for
    each row, are left out.
    """
    T, D, H, E, k = shape
    R = T * k
    x, rows, hidden, matrix = (size / 1e9 for size in (T * D, R * D, R * H, E * D * H))  # bytes in float8
    product = 2 * R * D * H / 1e12
    return {
        "cast of tokens": Work(3 * x),
        "cast of columns, up": Work(3 * matrix),  # of one matrix; gate's is another
        "cast of columns, down": Work(3 * matrix),
        "cast of hidden rows": Work(3 * hidden),
        "up, float8": Work(x + 2 * matrix + 6 * hidden, 2 * product, True),
        "down, float8": Work(hidden + matrix + 2 * rows, product, True),
        "cast of rows, down": Work(3 * matrix),
        "hidden, backward, float8": Work(x + matrix + 10 * hidden, product, True),
        "cast of rows, up": Work(6 * matrix),
        "cast of gradients": Work(6 * hidden),
        "down, backward, float8": Work(2 * hidden + 2 * matrix + 2 * rows, 2 * product, True),
    }


def float8_step(shape: Shape) -> dict[str, Work]:
    """Every kernel of a step with precision="fp8"."""
    replaced, cast = {"up", "down", "hidden, backward", "down, backward"}, float8_works(shape)
    again = {"cast of gradients of y": cast["cast of tokens"], "cast of columns, gate": cast["cast of columns, up"]}
    return {name: work for name, work in works(shape).items() if name not in replaced} | cast | again


def total(every: dict[str, Work]) -> Work:
    """Bytes and operations of all."""
    return Work(sum(work.gb for work in every.values()), sum(work.tflop for work in every.values()))


def rows(shape: Shape, names: tuple[str, ...] = ("H100", "H200"), float8: bool = False) -> list[Row]:
    """A row for each kernel, and one for the step, with floor and expected milliseconds on these GPUs.

    With `float8`, the kernels that a step in float8 has in place of others, and the step in float8.
    """
    step_of = float8_step(shape) if float8 else works(shape)
    every = list((float8_works(shape) if float8 else step_of).items())
    made: list[Row] = []
    for name, work in every:
        row: Row = {"kernel": name, "GB": f"{work.gb:.3f}", "TFLOP": f"{work.tflop:.3f}" if work.tflop else ""}
        for gpu in names:
            row[f"{gpu}: floor ms"] = f"{work.floor(DEVICES[gpu]):.3f}"
            row[f"{gpu}: expected"] = f"{work.expected(DEVICES[gpu]):.3f}"
        made.append(row)
    whole = total(step_of)
    step: Row = {"kernel": "step", "GB": f"{whole.gb:.2f}", "TFLOP": f"{whole.tflop:.2f}"}
    for gpu in names:
        step[f"{gpu}: floor ms"] = f"{sum(work.floor(DEVICES[gpu]) for work in step_of.values()):.1f}"
        step[f"{gpu}: expected"] = f"{sum(work.expected(DEVICES[gpu]) for work in step_of.values()):.1f}"
    return [*made, step]


if __name__ == "__main__":
    given = tuple(int(each) for each in sys.argv[1:] if each != "float8")
    if len(given) not in (0, 5):
        sys.exit("give T, D, H, E and k, or nothing")
    print(table(rows(given or FIRST, float8="float8" in sys.argv)))  # pyright: ignore[reportArgumentType]
