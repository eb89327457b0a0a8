"""Tiles of grouped GEMMs: which rows each program takes, and the tile sizes of each kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MANY = 64  # an expert with more rows than this has many


class Tiles(NamedTuple):
    """Rows of each program in a grid over row tiles.

    Attributes:
        expert: int32 [M], expert of each tile; -1 = unused tile.
        start: int32 [M], first row of each tile.
        ends: int32 [L], end of each expert's rows.
    """

    expert: Tensor
    start: Tensor
    ends: Tensor

    @classmethod
    def of(cls, ends: Tensor, rows: int, size: int) -> Tiles:
        """Cut `rows` rows into M = rows // size + L tiles of `size` rows, each with rows of one expert. No host sync.

        Args:
            ends: int32 [L], end of each expert's rows.
            rows: number of rows R, at least ends[-1].
            size: rows of a tile.

        >>> expert, start, _ = Tiles.of(torch.tensor([3, 3, 8], dtype=torch.int32), rows=9, size=2)
        >>> expert.tolist(), start.tolist()
        ([0, 0, 2, 2, 2, -1, -1], [0, 2, 3, 5, 7, 0, 0])
        """
        first = torch.cat([ends.new_zeros(1), ends[:-1]])
        until = ((ends - first + size - 1) // size).cumsum(0, dtype=torch.int32)  # tiles up to each expert, inclusive
        tile = torch.arange(rows // size + len(ends), dtype=torch.int32, device=ends.device)
        expert = torch.searchsorted(until, tile, right=True, out_int32=True)
        real, expert = expert < len(ends), expert.clamp(max=len(ends) - 1)
        before = torch.cat([until.new_zeros(1), until[:-1]])[expert]
        start = first[expert] + (tile - before) * size
        return cls(torch.where(real, expert, -1), torch.where(real, start, 0), ends)


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
        kernel: ``"up"``, ``"down"``, ``"hidden"`` or ``"weight"``.
        device: name of the GPU.
        dtype: dtype of the operands, as text.
        shape: shape of an expert's matrix in the product: [summed over, columns of the result]. For "weight", the shape
            of the gradient.
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
        return cls(kernel, device_name(x.device), str(x.dtype), shape, kernel == "weight" or rows > MANY)


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
    size = (_LARGE if major in (9, 10) else _MEDIUM)[kernel]
    return size if many or kernel == "weight" else size._replace(rows=64, warps=4)


_BIAS = Blocks(64, 64, 0, 4, 3)  # a sum over rows without products, limited by memory
_FLOAT32 = Blocks(64, 64, 32, 8, 2)
# "up" and "weight" hold two accumulators of this size.
_MEDIUM = {  # fits 99 KiB of shared memory: sm_80, 86, 89, 120
    "up": Blocks(128, 64, 32, 4, 3),
    "down": Blocks(128, 64, 32, 4, 3),
    "hidden": Blocks(64, 64, 32, 4, 3),  # its epilogue needs many registers
    "weight": Blocks(128, 64, 32, 4, 3),
}
_LARGE = {  # fits 227 KiB of shared memory: sm_90, sm_100
    "up": Blocks(128, 128, 64, 8, 3, True),
    "down": Blocks(128, 256, 64, 8, 3, True),
    "hidden": Blocks(128, 64, 64, 8, 4, True),
    "weight": Blocks(128, 128, 64, 8, 3, True),
}
