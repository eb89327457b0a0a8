"""Triton's interpreter, its bfloat16 and float8 repaired."""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def repair() -> None:
    """Let Triton's interpreter (3.7) compute in bfloat16 and float8 (e4m3) as a GPU does.

    It keeps such numbers as their bits, multiplies those of bfloat16 as integers in `tl.dot`, and those of float8 in
    float16; and from float32 it rounds towards zero, where a GPU rounds to the nearest.
    """
    dot, cast, convert = (getattr(InterpreterBuilder, n) for n in ("create_dot", "cast_impl", "create_fp_to_fp"))

    def create_dot(self, a, b, d, *more):
        return dot(self, *(widened[t.dtype.scalar](t) if t.dtype.scalar in widened else t for t in (a, b)), d, *more)

    def create_fp_to_fp(self, src, dst_type, rounding):
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.float8e4nv):
            x = torch.from_numpy(np.ascontiguousarray(src.data)).clamp(-448, 448)  # a GPU saturates
            return TensorHandle(x.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), tl.float8e4nv)
        return convert(self, src, dst_type, rounding)

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(_nearest(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    widened = {tl.bfloat16: _float32, tl.float8e4nv: _from_float8}


def _float32(handle: TensorHandle) -> TensorHandle:
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _from_float8(handle: TensorHandle) -> TensorHandle:
    x = torch.from_numpy(np.ascontiguousarray(handle.data)).view(torch.float8_e4m3fn)
    return TensorHandle(x.float().numpy(), tl.float32)


def _nearest(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16, the even one of two."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)
