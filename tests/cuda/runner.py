"""Runs the kernels of cuda/ on CPU tensors: g++ compiles the sources that ship, through cuda_on_cpu.h.

A `Runner` is a backend of `turnout.cuda.launch`; `installed` and the fixtures in conftest.py make it that of the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from instances import INSTANCES
from turnout.cuda import launch

HERE = Path(__file__).resolve().parent
FORWARD, REVERSED, RANDOM = 0, 1, 2  # in which order threads and blocks take turns; from RANDOM on, a seed
# -O1 compiles fastest in all. What is a product and a sum in the source stays one; the GPU's sources say the same.
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", f"-I{HERE}")
# The sanitizers that make a program stop; g++ runs them where the address sanitizer was loaded before Python.
SANITIZERS = ("-g", "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow", "-fno-sanitize-recover=all")
COVERAGE = ("--coverage", "-O0", "-DON_CPU_COVERAGE")  # gcov counts lines; the library writes with dump_coverage()


def cache() -> Path:
    """Where compiled kernels stay from one test run to the next."""
    folder = Path(tempfile.gettempdir()) / f"turnout-cuda-on-cpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


class Library:
    """One source compiled by g++, with `kernels` (names with template arguments) as what it exports."""

    def __init__(self, source: Path, kernels: tuple[str, ...], flags: tuple[str, ...] = ()) -> None:
        self.names = {kernel: f"kernel_{number}" for number, kernel in enumerate(kernels)}
        exports = "".join(f"EXPORT_KERNEL({name}, {kernel})\n" for kernel, name in self.names.items())
        unit = f'#include "cuda_on_cpu.h"\n#include "{source}"\n{exports}'
        headers = sorted([*HERE.glob("*.h"), *launch.FOLDER.glob("*.cuh"), *source.parent.glob("*.cuh"), source])
        key = "\0".join([unit, *(path.read_text() for path in headers), *FLAGS, *flags])
        self.path = cache() / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
        if not self.path.exists():
            self._compile(unit, flags)
        self.library = ctypes.CDLL(str(self.path))

    def _compile(self, unit: str, flags: tuple[str, ...]) -> None:
        if shutil.which("g++") is None:
            raise FileNotFoundError("g++ is not on the PATH: tests that run kernels on the CPU need it")
        source = self.path.with_suffix(".cpp")
        source.write_text(unit)
        built = self.path.with_suffix(f".{os.getpid()}")
        command = ["g++", *FLAGS, *flags, f"-I{launch.FOLDER}", "-shared", str(source), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        built.rename(self.path)  # whole or not at all, for another process that looks

    def signature(self, kernel: str) -> str:
        """The letters of the C++ parameters, as in `launch.Kernel`."""
        function = getattr(self.library, f"{self.names[kernel]}_signature")
        function.restype = ctypes.c_char_p
        return function().decode()

    def run(
        self,
        kernel: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[launch.Packed, ...],
        shared: int,
        order: int,
    ) -> None:
        """Run all threads of all blocks; RuntimeError if they wait for each other or misuse a warp primitive."""
        function = getattr(self.library, self.names[kernel])
        function.restype = ctypes.c_char_p
        values = [np.asarray(np.uint64(arg) if isinstance(arg, int) else arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        sizes = (ctypes.c_uint * 6)(*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3])
        error = function(pointers, sizes, ctypes.c_size_t(shared), order)
        if error:
            raise RuntimeError(f"{kernel}: {error.decode()}")


@functools.cache
def library(kernel: str, flags: tuple[str, ...] = ()) -> Library:
    """The library with `kernel`: that of all instances of its source, or one of its own."""
    name = launch.KERNELS[kernel.partition("<")[0]].source
    instances = INSTANCES.get(name, ())
    return _library(launch.FOLDER / name, instances if kernel in instances else (kernel,), flags)


_library = functools.cache(Library)


@dataclass
class Runner:
    """The backend of CPU tensors; `launched` counts the launches of each kernel."""

    order: int = FORWARD
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.launched: dict[str, int] = {}

    def __call__(
        self,
        kernel: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[launch.Packed, ...],
        shared: int,
        device: torch.device,
    ) -> None:
        """Run `kernel` to its end."""
        self.launched[kernel] = self.launched.get(kernel, 0) + 1
        library(kernel, self.flags).run(kernel, grid, block, args, shared, self.order)


@contextmanager
def installed(runner: Runner | None) -> Iterator[None]:
    """CPU tensors run kernels through `runner`, or none at all."""
    before = launch.backends.pop("cpu", None)
    if runner is not None:
        launch.backends["cpu"] = runner
    try:
        yield
    finally:
        launch.backends.pop("cpu", None)
        if before is not None:
            launch.backends["cpu"] = before
