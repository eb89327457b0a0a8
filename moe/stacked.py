"""Tensors stacked over the experts: what a rank holds of one is read from its type and mesh."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """The part of a stacked tensor that lies here; differentiable."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every rank that holds a part: a collective for those."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_as(tensor: Tensor, rows: Tensor) -> Tensor:
    """The part of a stacked tensor that lies here, in the dtype of rows: that of the tensor, or autocast's."""
    held = local(tensor)
    if held.dtype == rows.dtype or torch.is_autocast_enabled(rows.device.type):
        return held.to(rows.dtype)
    raise TypeError(f"tokens are {rows.dtype} and expert weights {held.dtype}: convert one, or use torch.autocast")


def held_slice(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor lies here, one slice per axis."""
    shape, offset = tuple(tensor.shape), (0,) * tensor.ndim
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(first, first + length) for first, length in zip(offset, shape, strict=True))


def seeded(seed: int, use: str) -> torch.Generator:
    """A generator for what `use` names, such as an expert by its global id: the same wherever that lies."""
    digest = hashlib.blake2b(f"{seed}/{use}".encode(), digest_size=7).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest))
