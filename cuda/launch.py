"""Compile the CUDA kernels of this folder at run time, and launch them: `launch`."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent


class Kernel(NamedTuple):
    """Source file and parameters of a `__global__` function, with one letter for each parameter.

    P is a pointer, i an int (32 bits), q a long long (64 bits), f a float. Tests compare the letters with the C++.
    """

    source: str
    signature: str


KERNELS = {
    "encode": Kernel("encode.cu", "PPPPqqii"),
    "decode": Kernel("decode.cu", "PPPPqii"),
    "decode_backward": Kernel("decode.cu", "PPPPPPPqqii"),
    "plan_count": Kernel("plan.cu", "PPiii"),
    "plan_place": Kernel("plan.cu", "PPPPPiiiii"),
    "route": Kernel("router.cu", "PPPPPiiiii"),
    "route_backward": Kernel("router.cu", "PPPPPiiiii"),
}

OLDEST = (8, 0)  # lowest compute capability: the router needs its reductions over a warp
GRANTED = 48 * 1024  # bytes of shared memory that a kernel gets without asking for more
Argument = Tensor | int | float | None
Packed = int | np.generic  # a pointer, or a number of the parameter's width


class Backend(Protocol):
    """Launches kernels on tensors of one type of device."""

    def __call__(
        self,
        kernel: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Packed, ...],
        shared: int,
        device: torch.device,
    ) -> None:
        """Launch `kernel` with packed arguments. The other arguments are as in `launch`."""
        ...


def launch(
    kernel: str, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Argument], shared: int = 0
) -> None:
    """Launch a kernel on the device of its tensors, on torch's current stream. It does not wait for the kernel.

    Args:
        kernel: name of the kernel in `KERNELS`, with its template arguments: ``"decode<float, uint4, 2>"``.
        grid: number of blocks on up to three axes. If one of them is 0, nothing is launched.
        block: number of threads of a block on up to three axes.
        args: arguments in the order of the C++ parameters: contiguous tensors, None for a null pointer, and numbers.
        shared: bytes of dynamic shared memory for each block, 0 by default.

    Raises:
        ImportError: the tensors are on a CUDA device, and CuPy is missing.
        ValueError: the tensors are on several devices, not contiguous, or on a device that runs no kernels.
    """
    devices = {arg.device for arg in args if isinstance(arg, Tensor)}
    if len(devices) != 1:
        raise ValueError(f"{kernel} needs all its tensors on one device; got {sorted(map(str, devices))}")
    device = devices.pop()
    if device.type not in backends:
        raise ValueError(f"{kernel} runs on {' and '.join(backends)} tensors; got {device.type} tensors")
    signature = KERNELS[kernel.partition("<")[0]].signature
    packed = tuple(_pack(kernel, letter, arg) for letter, arg in zip(signature, args, strict=True))
    if 0 not in grid:
        backends[device.type](kernel, grid, block, packed, shared, device)


def available(device: torch.device) -> bool:
    """Whether `launch` supports this device. A warning says so once if CuPy is missing or the GPU is too old."""
    if device.type == "cuda" and backends["cuda"] is launch_cupy:
        return _has_cupy() and _is_recent(device)
    return device.type in backends


def _pack(kernel: str, letter: str, arg: Argument) -> Packed:
    if letter == "P":
        if isinstance(arg, Tensor) and not arg.is_contiguous():
            raise ValueError(f"{kernel} needs contiguous tensors; got strides {arg.stride()} of {tuple(arg.shape)}")
        return 0 if arg is None else arg.data_ptr()  # type: ignore[union-attr]
    return NUMBERS[letter](arg)


NUMBERS: dict[str, Any] = {"i": np.int32, "q": np.int64, "f": np.float32}


def launch_cupy(
    kernel: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    args: tuple[Packed, ...],
    shared: int,
    device: torch.device,
) -> None:
    """Backend for CUDA tensors: NVRTC and the driver, through CuPy."""
    with torch.cuda.device(device), _cupy().cuda.Stream.from_external(torch.cuda.current_stream(device)):
        function = _function(kernel)
        if shared > GRANTED and shared > function.max_dynamic_shared_size_bytes:
            function.max_dynamic_shared_size_bytes = shared
        function(grid, block, args, shared_mem=shared)


backends: dict[str, Backend] = {"cuda": launch_cupy}  # by device type; tests add one that runs kernels on the CPU


@functools.cache
def _function(kernel: str) -> Any:
    """The compiled kernel. CuPy compiles it for the current device, and caches the result on disk."""
    source = (FOLDER / KERNELS[kernel.partition("<")[0]].source).read_text()
    options = (f"-I{FOLDER}", "-std=c++17", f"-DTURNOUT_HEADERS=0x{_headers()}")
    return _cupy().RawModule(code=source, options=options, name_expressions=(kernel,)).get_function(kernel)


@functools.cache
def _headers() -> str:
    """Digest of all headers, because CuPy's cache keys a source by its own text without its includes."""
    texts = (path.read_bytes() for path in sorted(FOLDER.glob("*.cuh")))
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def _cupy() -> Any:
    try:
        # imported here because it takes half a second, and most processes launch no kernel
        import cupy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f'CUDA kernels need CuPy: pip install "turnout[{_extra()}]"') from error
    return cupy


@functools.cache
def _has_cupy() -> bool:
    if torch.version.cuda is None:  # devices of ROCm are named "cuda" too
        return False
    try:
        _cupy()
    except ImportError as error:
        logging.getLogger(__name__).warning("%s. Until then these operators run in plain PyTorch.", error)
        return False
    return True


@functools.cache
def _is_recent(device: torch.device) -> bool:
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        words = "CUDA kernels need compute capability %d.%d, and %s has %d.%d: these operators run in plain PyTorch."
        logging.getLogger(__name__).warning(words, *OLDEST, device, *capability)
    return capability >= OLDEST


def _extra() -> str:
    return "cuda12" if (torch.version.cuda or "").startswith("12.") else "cuda"
