"""Tile sizes of each grouped GEMM."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MANY = 64  # an expert with more rows than this has many
WEIGHTS = ("weight", "weights")  # products that sum over rows, so that tiles do not depend on their number


class Blocks(NamedTuple):
    """Sizes of a tile, and how a GPU computes it.

    Attributes:
        rows: rows of a tile of the result.
        columns: columns of a tile of the result.
        depth: terms that are summed between two loads.
        warps: warps that share a tile.
        stages: loads under way at the same time.
        descriptors: whether the copy engine (TMA, sm_90 and later) loads operands that are contiguous in memory. False
            by default.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    descriptors: bool = False


class Product(NamedTuple):
    """A grouped GEMM, with the properties that its best tile sizes depend on.

    Attributes:
        kernel: ``"up"``, ``"down"``, ``"hidden"``, ``"weight"`` (one gradient) or ``"weights"`` (two at once).
        device: name of the GPU.
        dtype: dtype of the operands, as text.
        shape: shape of an expert's matrix in the product: [summed over, columns of the result]. For "weight" and
            "weights", the shape of a gradient.
        many: whether an expert has many rows on average (more than 64).
    """

    kernel: str
    device: str
    dtype: str
    shape: tuple[int, int]
    many: bool

    @classmethod
    def of(cls, kernel: str, x: Tensor, rows: int, shape: tuple[int, int]) -> Product:
        """The product over operands like `x`, on its device, with `rows` rows per expert on average."""
        return cls(kernel, device_name(x.device), str(x.dtype), shape, kernel in WEIGHTS or rows > MANY)


def device_name(device: torch.device) -> str:
    """Name of the GPU, or "cpu"."""
    return torch.cuda.get_device_properties(device).name if device.type == "cuda" else device.type


# Tile sizes that `moe.autotune` measured in this process. They are facts about the machine, like compiled kernels.
MEASURED: dict[Product, Blocks] = {}


def blocks(kernel: str, x: Tensor, rows: int, shape: tuple[int, int] | None = None) -> Blocks:
    """Tile sizes of a kernel (see `Product.of`): the measured ones if this `shape` was measured, else `sizes`."""
    if shape is not None and MEASURED and (found := MEASURED.get(Product.of(kernel, x, rows, shape))):
        return found
    if x.device.type != "cuda":  # in Triton's interpreter, the smallest tiles give even small inputs several
        return Blocks(16, 16, 16, 4, 1, descriptors=True)
    return sizes(kernel, x.element_size(), torch.cuda.get_device_capability(x.device)[0], rows > MANY)


def sizes(kernel: str, itemsize: int, major: int, many: bool) -> Blocks:
    """Default tile sizes for a GPU of compute capability `major`. They spill no registers; their speed is not measured.

    Args:
        kernel: as in `Product`, or ``"bias"``.
        itemsize: bytes of each number of the operands.
        major: compute capability of the GPU, its first number.
        many: whether an expert has many rows on average (more than 64).
    """
    if kernel == "bias":
        return _BIAS
    if itemsize == 4:
        return _FLOAT32
    tables = (_LARGE, _LARGE_FLOAT8) if major in (9, 10) else (_MEDIUM, _MEDIUM_FLOAT8)
    size = tables[itemsize == 1][kernel]
    return size if many or kernel in WEIGHTS else size._replace(rows=64, warps=4)


_BIAS = Blocks(64, 64, 0, 4, 3)  # a sum over rows without products, limited by memory
_FLOAT32 = Blocks(64, 64, 32, 8, 2)
# "up" and "weights" hold two accumulators of this size.
_MEDIUM = {  # fits 99 KiB of shared memory: sm_80, 86, 89, 120
    "up": Blocks(128, 64, 32, 4, 3),
    "down": Blocks(128, 64, 32, 4, 3),
    "hidden": Blocks(128, 64, 32, 4, 3),
    "weight": Blocks(128, 64, 32, 4, 3),
    "weights": Blocks(128, 64, 32, 4, 3),
}
_LARGE = {  # fits 227 KiB of shared memory: sm_90, sm_100
    "up": Blocks(128, 128, 64, 8, 3, True),
    "down": Blocks(128, 256, 64, 8, 3, True),
    "hidden": Blocks(128, 128, 64, 8, 4, True),
    "weight": Blocks(128, 256, 64, 8, 3, True),
    "weights": Blocks(128, 128, 64, 8, 3, True),
}
# Products in float8 alone. Gradients of weights are not among them. Each sum holds a second one of 128 terms on sm_90.
_MEDIUM_FLOAT8 = {
    "up": Blocks(128, 64, 64, 4, 3),
    "down": Blocks(128, 64, 64, 4, 3),
    "hidden": Blocks(128, 64, 64, 4, 3),
}
_LARGE_FLOAT8 = {
    "up": Blocks(256, 64, 128, 8, 3, True),
    "down": Blocks(128, 128, 128, 8, 4, True),
    "hidden": Blocks(128, 128, 128, 8, 4, True),
}
