"""Time of one kernel: matrix products by their tiles, everything else by the bytes that it moves."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from .cluster import Device

# Tiles that a library of products has, and the share of its best rate that each keeps: a smaller tile reads more bytes
# from shared memory for a FLOP (CUTLASS's and cuBLAS's usual ones; shares as in NVIDIA's guide to matrix products).
TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.94), (128, 64, 0.80), (64, 64, 0.62))
PROLOGUE = 96  # elements of k that a tile's start and end take as long as: filling the pipeline, writing the result
SPLITS = (1, 2, 4, 8)  # parts in which k is cut where there are fewer tiles than multiprocessors


class Kernels(NamedTuple):
    """Times of kernels on a device, in seconds, for elements of `size` bytes and products at `peak` FLOP/s."""

    device: Device
    peak: float
    size: int

    def product(self, m: int, n: int, k: int, count: float = 1, accumulate: float = 0.0) -> float:
        """Seconds of `count` products [m, k] @ [k, n] in one kernel.

        The tiles of the result go to the multiprocessors in waves, and the last wave is rarely full (wave
        quantisation). Tiles at the edges are computed whole (tile quantisation). The best tile size counts, because
        libraries choose one by a heuristic. No product is faster than its operands can be read. With `accumulate`, the
        result is added to numbers of that many bytes.
        """
        if not m or not n or not k or not count:
            return 0.0
        device = self.device
        rate = self.peak * device.product_share / device.sms  # of a multiprocessor, at most
        best = float("inf")
        for tm, tn, share in TILES:
            tiles = ceil(m / tm) * ceil(n / tn) * count
            for split in SPLITS:
                if split > 1 and (tiles >= 2 * device.sms or k < 512 * split):
                    break
                waves = ceil(tiles * split / device.sms)
                time = waves * 2 * tm * tn * (k / split + PROLOGUE) / (rate * share)
                if split > 1:
                    time += self.moved(4 * split * m * n * count)
                best = min(best, time)
        result = accumulate * 2 if accumulate else self.size
        read = count * (self.size * (m * k + k * n) + result * m * n)
        return max(best, self.moved(read)) + self.start

    def grouped(self, groups: int, rows: float, n: int, k: int, accumulate: float = 0.0) -> float:
        """Seconds of a grouped GEMM of `groups` products [rows, k] @ [k, n]; `rows` is the mean of an expert."""
        return self.product(max(1, ceil(rows)), n, k, groups, accumulate) if rows else 0.0

    def moved(self, size: float) -> float:
        """Seconds to read or write `size` bytes of device memory."""
        return size / (1e9 * self.device.memory_gbs * self.device.memory_share)

    def elementwise(self, size: float, kernels: int = 1) -> float:
        """Seconds of kernels that move `size` bytes in all."""
        return self.moved(size) + kernels * self.start

    @property
    def start(self) -> float:
        """Seconds of a kernel that does nothing."""
        return 1e-6 * self.device.kernel_us
