"""Tensors stacked over the experts: what a rank holds of one is read from its type and mesh."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """The part of a stacked tensor that lies here; differentiable."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_slice(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor lies here, one slice per axis."""
    shape, offset = tuple(tensor.shape), (0,) * tensor.ndim
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(first, first + length) for first, length in zip(offset, shape, strict=True))
