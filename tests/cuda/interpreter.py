"""Triton's interpreter, its bfloat16 repaired."""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def repair() -> None:
    """Let Triton's interpreter (3.7) compute in bfloat16 as a GPU does.

    It keeps such numbers as their bits, in uint16, and multiplies the bits as integers in `tl.dot`; and from float32
    it rounds towards zero, where a GPU rounds to the nearest.
    """
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, d, *more):
        return dot(self, *(_float32(t) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)), d, *more)

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(_nearest(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl


def _float32(handle: TensorHandle) -> TensorHandle:
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _nearest(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16, the even one of two."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)
