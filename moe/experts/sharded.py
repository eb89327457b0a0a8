"""Stacked expert tensors sharded over ranks (DTensors): local parts, their slices, loading and in-place changes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...dispatch.torch_internals import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """The part of a stacked tensor that this rank holds; differentiable."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor. For a DTensor this is a collective of all ranks that hold a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_as(tensor: Tensor, rows: Tensor) -> Tensor:
    """The part that this rank holds, in the dtype of `rows`. The two dtypes may differ only under autocast."""
    held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if held.dtype == rows.dtype or torch.is_autocast_enabled(rows.device.type):
        return held.to(rows.dtype)
    raise TypeError(
        f"tokens are {rows.dtype} and expert weights are {held.dtype}: convert one of them, or use torch.autocast"
    )


def held_slice(tensor: Tensor) -> tuple[slice, ...]:
    """The part of the whole tensor that this rank holds, as one slice per axis."""
    shape, offset = tuple(tensor.shape), (0,) * tensor.ndim
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(first, first + length) for first, length in zip(offset, shape, strict=True))


def seeded(seed: int, use: str) -> torch.Generator:
    """CPU generator for one purpose, such as an expert's global id in `use`: the same on every rank that asks."""
    digest = hashlib.blake2b(f"{seed}/{use}".encode(), digest_size=7).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest))


def unchanged(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
    """Forward hook: makes backward raise if a DTensor of the module has been changed in place since the forward."""
    return watching(y, *module.parameters(), *module.buffers())


def watching(y: Tensor, *tensors: Tensor) -> Tensor:
    """y, whose backward raises if a DTensor among `tensors` has been changed in place, as it does for plain tensors.

    A computation with `local(tensor)` saves the local part for backward. An in-place change of the DTensor does not
    move the version counter of that part, only its own. So the DTensor is saved as well, and autograd compares its
    version. Changes by torch's foreach and fused operations, and in compiled graphs, are not noticed.
    """
    spread = [t for t in tensors if isinstance(t, DTensor)]
    if not spread or torch.compiler.is_compiling() or not y.requires_grad:
        return y
    return _Unchanged.apply(y, spread)  # pyright: ignore[reportReturnType]


class _Unchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, tensors):
        ctx.save_for_backward(*tensors)
        return y.detach()  # not a view, because FSDP2 warns about modules that return one

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        _ = ctx.saved_tensors  # autograd raises if one has changed
        return grad, None


def take_parts(module: nn.Module, state: dict[str, Any], prefix: str, order: Sequence[int] | None = None) -> None:
    """Before `module` loads a state dict, replace whole tensors in it by the DTensor part that this rank holds.

    Otherwise ``load_state_dict(whole, assign=True)`` would give every rank all experts. `order` says which expert is in
    which slot of axis 0; None, the default: expert e is in slot e.

    Raises:
        ValueError: the state dict holds the part of another rank, or a DTensor with another mesh or placement.
    """
    mine = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in mine:
        value = state.get(prefix + name)
        if not isinstance(tensor, DTensor) or not isinstance(value, Tensor):
            continue
        if isinstance(value, DTensor):
            _check_part(prefix + name, value, tensor)
        elif value.shape == tensor.shape:
            here, *inside = held_slice(tensor)
            experts = here if order is None else list(order[here])
            state[prefix + name] = DTensor.from_local(
                value.detach()[experts][:, *inside].clone(),  # a view would keep the whole tensor in memory
                tensor.device_mesh,
                tensor.placements,
                run_check=False,
                shape=tensor.shape,
                stride=tensor.stride(),
            )


def _check_part(name: str, value: DTensor, tensor: DTensor) -> None:
    if (value.device_mesh, value.placements) != (tensor.device_mesh, tensor.placements):
        raise ValueError(
            f"{name} in the state dict is a DTensor with placements {value.placements} on {value.device_mesh}, but the "
            f"model has it with {tensor.placements} on {tensor.device_mesh}: load with torch.distributed.checkpoint, "
            "or pass value.full_tensor()"
        )
    here = (value.device_mesh.mesh == dist.get_rank()).nonzero().flatten().tolist()
    there = list(value.device_mesh.get_coordinate() or ())
    if here and here != there:  # an unpickled mesh keeps the coordinates of the rank that saved it
        raise ValueError(
            f"{name} was saved by the rank at {there} of the mesh, and holds its experts; rank {dist.get_rank()} is at "
            f"{here}: save and load with torch.distributed.checkpoint"
        )
