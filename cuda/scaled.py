"""`Scaled`, an operand of a product in float8."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scaled(NamedTuple):
    """Numbers in float8 (e4m3), each row with a scale: values * scale.

    Attributes:
        values: float8_e4m3fn, rows [R, K], or the columns of an expert's matrix [L, N, K], one after the other. What is
            summed over lies together in memory, as Hopper's products in float8 need it.
        scale: float32 powers of two, [R] or [L, N].
        dtype: dtype of the numbers before, in which results are returned.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype


def parts(operand: Tensor | Scaled) -> tuple[Tensor, Tensor | None]:
    """Values of an operand, and their scale, None if they have none."""
    return (operand, None) if isinstance(operand, Tensor) else (operand.values, operand.scale)
