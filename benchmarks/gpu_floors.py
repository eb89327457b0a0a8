"""Floor and expected time of each kernel of a training step, by arithmetic from bytes and operations.

    python benchmarks/gpu_floors.py                              # the first shape, on an H100 and an H200
    python benchmarks/gpu_floors.py 16384 2048 1024 64 8

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
    """

    tb: float
    tflop: float


DEVICES = {
    "H200": Device(4.8, 989),
    "H100 PCIe": Device(2.0, 756),
    "H100": Device(3.35, 989),
    "A100": Device(2.04, 312),
    "B200": Device(8.0, 2250),
}
MOVED, MULTIPLIED, LAUNCH_MS = 0.85, 0.65, 0.005  # shares of the nominal rates to expect


class Work(NamedTuple):
    """Work of one kernel, or of adjacent ones.

    Attributes:
        gb: bytes that must move, in 10^9.
        tflop: operations of matrix products, in 10^12.
    """

    gb: float
    tflop: float = 0.0

    def floor(self, on: Device) -> float:
        """Milliseconds at nominal rates."""
        return max(self.gb / on.tb, 1e3 * self.tflop / on.tflop)

    def expected(self, on: Device) -> float:
        """Milliseconds at the rates that good kernels reach."""
        return LAUNCH_MS + max(self.gb / on.tb / MOVED, 1e3 * self.tflop / on.tflop / MULTIPLIED)


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


def total(shape: Shape) -> Work:
    """Work of the whole step."""
    every = works(shape).values()
    return Work(sum(work.gb for work in every), sum(work.tflop for work in every))


def rows(shape: Shape, names: tuple[str, ...] = ("H100", "H200")) -> list[Row]:
    """A row for each kernel, and one for the step, with floor and expected milliseconds on these GPUs."""
    every = list(works(shape).items())
    made: list[Row] = []
    for name, work in every:
        row: Row = {"kernel": name, "GB": f"{work.gb:.3f}", "TFLOP": f"{work.tflop:.3f}" if work.tflop else ""}
        for gpu in names:
            row[f"{gpu}: floor ms"] = f"{work.floor(DEVICES[gpu]):.3f}"
            row[f"{gpu}: expected"] = f"{work.expected(DEVICES[gpu]):.3f}"
        made.append(row)
    step: Row = {"kernel": "step", "GB": f"{total(shape).gb:.2f}", "TFLOP": f"{total(shape).tflop:.2f}"}
    for gpu in names:
        step[f"{gpu}: floor ms"] = f"{sum(work.floor(DEVICES[gpu]) for _, work in every):.1f}"
        step[f"{gpu}: expected"] = f"{sum(work.expected(DEVICES[gpu]) for _, work in every):.1f}"
    return [*made, step]


if __name__ == "__main__":
    given = tuple(int(each) for each in sys.argv[1:])
    if len(given) not in (0, 5):
        sys.exit("give T, D, H, E and k, or nothing")
    print(table(rows(given or FIRST)))  # pyright: ignore[reportArgumentType]
