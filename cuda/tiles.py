"""How grouped products are cut into tiles: which rows each program takes, and the sizes of a tile."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """Which rows the programs of a grid over row tiles take.

    Attributes:
        expert: int32 [M], the expert of each tile, -1 = a tile too many.
        start: int32 [M], its first row.
        ends: int32 [L], where each expert's rows end.
    """

    expert: Tensor
    start: Tensor
    ends: Tensor

    @classmethod
    def of(cls, ends: Tensor, rows: int, size: int) -> Tiles:
        """Cut `rows` rows into tiles of `size`, none over two experts; M = rows // size + L, and no host sync.

        >>> expert, start, _ = Tiles.of(torch.tensor([3, 3, 8], dtype=torch.int32), rows=9, size=2)
        >>> expert.tolist(), start.tolist()
        ([0, 0, 2, 2, 2, -1, -1], [0, 2, 3, 5, 7, 0, 0])
        """
        first = torch.cat([ends.new_zeros(1), ends[:-1]])
        until = ((ends - first + size - 1) // size).cumsum(0, dtype=torch.int32)  # tiles up to and with each expert
        tile = torch.arange(rows // size + len(ends), dtype=torch.int32, device=ends.device)
        expert = torch.searchsorted(until, tile, right=True, out_int32=True)
        real, expert = expert < len(ends), expert.clamp(max=len(ends) - 1)
        before = torch.cat([until.new_zeros(1), until[:-1]])[expert]
        start = first[expert] + (tile - before) * size
        return cls(torch.where(real, expert, -1), torch.where(real, start, 0), ends)


class Blocks(NamedTuple):
    """Sizes of a tile, and how a GPU works on it.

    Attributes:
        rows, columns: of a tile of the result.
        depth: what is summed over between two loads.
        warps: that share a tile.
        stages: loads under way at a time.
        descriptors: whether operands in the order of memory are loaded by the copy engine (TMA, sm_90 and later).
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    descriptors: bool = False


def blocks(kernel: str, x: Tensor, rows: int) -> Blocks:
    """For a kernel over tensors like `x`, on its device, with `rows` rows an expert on average."""
    if x.device.type != "cuda":  # Triton's interpreter: the smallest, so that small inputs have many
        return Blocks(16, 16, 16, 4, 1, descriptors=True)
    return sizes(kernel, x.element_size(), torch.cuda.get_device_capability(x.device)[0], rows > 64)


def sizes(kernel: str, itemsize: int, major: int, many: bool) -> Blocks:
    """For a GPU of compute capability `major`; `many` rows an expert or few. No register spills; else unmeasured."""
    if kernel == "bias":
        return _BIAS
    if itemsize == 4:
        return _FLOAT32
    size = (_LARGE if major in (9, 10) else _MEDIUM)[kernel]
    return size if many or kernel == "weight" else size._replace(rows=64, warps=4)


_BIAS = Blocks(64, 64, 0, 4, 3)  # a sum over rows: of no products, memory is the limit
_FLOAT32 = Blocks(64, 64, 32, 8, 2)
# "up" and "weight" hold two accumulators of this size.
_MEDIUM = {  # fits 99 KiB of shared memory: sm_80, 86, 89, 120
    "up": Blocks(128, 64, 32, 4, 3),
    "down": Blocks(128, 64, 32, 4, 3),
    "hidden": Blocks(64, 64, 32, 4, 3),  # whose epilogue wants many registers
    "weight": Blocks(128, 64, 32, 4, 3),
}
_LARGE = {  # 227 KiB: sm_90, sm_100
    "up": Blocks(128, 128, 64, 8, 3, True),
    "down": Blocks(128, 256, 64, 8, 3, True),
    "hidden": Blocks(128, 64, 64, 8, 4, True),
    "weight": Blocks(128, 128, 64, 8, 3, True),
}
