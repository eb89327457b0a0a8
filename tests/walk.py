"""The path of one forward through our own files: ``python tests/walk.py local|flat|2dh``.

It prints each function that runs, indented under its caller, and then what a reader has to read: files, functions,
moves between files, lines. A small layer in training, eager, on the CPU; its second forward, as the first one also
checks the gate and fills caches. "flat" has 2 gloo ranks and "2dh" 4, of which rank 0 is shown.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType

import torch
import turnout
from ranks import run
from torch.distributed.device_mesh import init_device_mesh
from turnout.moe import MoE, parallelize

ROOT = Path(turnout.__file__).parent
MESHES = {"flat": ((2,), ("ep",)), "2dh": ((2, 2), ("node", "local"))}


class Walk:
    """What runs between ``with`` and its end, as a tracer sees it; a comprehension or lambda is part of its function.

    Attributes:
        calls: (depth, code) of each function of ours, in the order in which they began.
        lines: (file, line) that ran.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, CodeType]] = []
        self.lines: set[tuple[str, int]] = set()
        self._depths: dict[FrameType, int] = {}  # it holds the frames: a generator's is entered many times

    def __enter__(self) -> Walk:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _):
        code, caller = frame.f_code, frame.f_back
        path = Path(code.co_filename)
        if not path.is_relative_to(ROOT) or path.is_relative_to(ROOT / "tests") or ".venv" in path.parts:
            return None
        if event == "line":
            self.lines.add((code.co_filename, frame.f_lineno))
        elif event == "call" and not code.co_name.startswith("<") and frame not in self._depths:
            while caller is not None and caller not in self._depths:
                caller = caller.f_back
            self._depths[frame] = 0 if caller is None else self._depths[caller] + 1
            self.calls.append((self._depths[frame], code))
        return self._trace

    def __str__(self) -> str:
        codes = [code for _, code in self.calls]
        places = [f"{Path(code.co_filename).relative_to(ROOT)}:{code.co_firstlineno}" for code in codes]
        shown = [
            f"{'  ' * depth}{code.co_qualname}".ljust(64) + place
            for (depth, code), place in zip(self.calls, places, strict=True)
        ]
        files, functions, moves, lines = self.figures
        figures = f"{files} files, {functions} functions, {moves} moves between files, {lines} lines executed"
        return "\n".join([*shown, "", figures])

    @property
    def figures(self) -> tuple[int, int, int, int]:
        """Files, functions, moves between files from one function's start to the next one's, and lines that ran."""
        codes = [code for _, code in self.calls]
        moves = sum(a.co_filename != b.co_filename for a, b in pairwise(codes))
        return len({code.co_filename for code in codes}), len(set(codes)), moves, len(self.lines)


def walk(how: str) -> Walk:
    """Walk through a forward on this rank, which is one of those that the mesh needs."""
    torch.manual_seed(0)
    layer = MoE(dim=16, hidden=32, num_experts=4, top_k=2)
    if how != "local":
        shape, names = MESHES[how]
        parallelize(layer, init_device_mesh("cpu", shape, mesh_dim_names=names), dispatcher=how)
    x = torch.randn(8, 16, requires_grad=True)
    layer(x)
    with Walk() as walked:
        layer(x)
    return walked


def shown(how: str) -> str:
    """The walk as text, which can leave its process."""
    return str(walk(how))


if __name__ == "__main__":
    if sys.argv[1:] not in (["local"], ["flat"], ["2dh"]):
        sys.exit(__doc__)
    torch.set_num_threads(1)
    (way,) = sys.argv[1:]
    ranks = {"local": 1, "flat": 2, "2dh": 4}[way]
    print(walk(way) if ranks == 1 else run(ranks, shown, way)[0])
