"""Compile CUDA C++ for any GPU without one: NVRTC by ctypes, from the wheels nvidia-cuda-nvrtc and -runtime."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple


class Compiled(NamedTuple):
    """A kernel as compiled for one architecture; spills in bytes, loads and stores as PTX has them."""

    registers: int
    spills: int
    accesses: list[str]  # "ld.global.nc.v4.u32"


@functools.cache
def folder() -> Path | None:
    """The wheels' common folder, `nvidia/cu13`; None if they are not installed."""
    found = importlib.util.find_spec("nvidia")
    for place in (found.submodule_search_locations or []) if found else []:
        if list(Path(place).glob("cu13/lib/libnvrtc.so.*")) and (Path(place) / "cu13/include/cuda_fp16.h").exists():
            return Path(place) / "cu13"
    return None


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    libraries = folder() / "lib"
    for path in libraries.glob("libnvrtc-builtins.so.*"):  # or NVRTC would look for it on the system
        ctypes.CDLL(str(path))
    (path,) = libraries.glob("libnvrtc.so.*")
    library = ctypes.CDLL(str(path))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _call(function: str, *args: object) -> None:
    code = getattr(_nvrtc(), function)(*args)
    if code:
        raise RuntimeError(f"{function}: {_nvrtc().nvrtcGetErrorString(code).decode()}")


def _text(function: str, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _call(f"{function}Size", program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    _call(function, program, text)
    return text.value.decode()


def compile_kernels(source: Path, kernels: tuple[str, ...], arch: int) -> dict[str, Compiled]:
    """All `kernels` of a source for sm_`arch`; RuntimeError with the compiler's log if it does not compile."""
    program = ctypes.c_void_p()
    _call("nvrtcCreateProgram", ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    try:
        for kernel in kernels:
            _call("nvrtcAddNameExpression", program, kernel.encode())
        options = [f"-arch=sm_{arch}", "-std=c++17", "-ftz=true", "--ptxas-options=-v"]
        options += [f"-I{source.parent}", f"-I{folder() / 'include'}"]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = _nvrtc().nvrtcCompileProgram(program, len(options), array)
        log = _text("nvrtcGetProgramLog", program)
        if failed:
            raise RuntimeError(log)
        names, lowered = {}, ctypes.c_char_p()
        for kernel in kernels:
            _call("nvrtcGetLoweredName", program, kernel.encode(), ctypes.byref(lowered))
            names[kernel] = lowered.value.decode()
        ptx = _text("nvrtcGetPTX", program)
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))
    return {kernel: _compiled(name, log, ptx) for kernel, name in names.items()}


def _compiled(name: str, log: str, ptx: str) -> Compiled:
    used = log.split(f"Compiling entry function '{name}'")[1].split("Compiling entry function")[0]
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", used))
    body = ptx.split(f".entry {name}(")[1].split("\n}\n")[0]
    accesses = re.findall(r"\b((?:ld|st)\.(?:global|local)[.\w:]*)", body)
    return Compiled(int(re.search(r"Used (\d+) registers", used).group(1)), spills, accesses)
