"""Tensors stacked over the experts: what a rank holds of one is read from its type and mesh."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...dispatch.torch_internals import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """The part of a stacked tensor that lies here; differentiable."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every rank that holds a part: a collective for those."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_as(tensor: Tensor, rows: Tensor) -> Tensor:
    """The part of a stacked tensor that lies here, in the dtype of rows: that of the tensor, or autocast's."""
    held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
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


def unchanged(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
    """A forward hook: a backward after a DTensor of the module was changed in place raises, as for a plain tensor."""
    return watching(y, *module.parameters(), *module.buffers())


def watching(y: Tensor, *tensors: Tensor) -> Tensor:
    """y, whose backward raises if one of the DTensors that it was computed from has been changed in place.

    Computing with `local(tensor)` saves the local part for the backward, whose version counter does not move when the
    DTensor is changed. The DTensor's does: so it is saved as well, and autograd compares. (torch's foreach and fused
    operations do not count their changes of a DTensor; in a compiled graph nothing is compared.)
    """
    spread = [t for t in tensors if isinstance(t, DTensor)]
    if not spread or torch.compiler.is_compiling() or not y.requires_grad:
        return y
    return _Unchanged.apply(y, spread)  # pyright: ignore[reportReturnType]


class _Unchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, tensors):
        ctx.save_for_backward(*tensors)
        return y.detach()  # not a view: FSDP2 warns of experts that return one

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        _ = ctx.saved_tensors  # raises where one has changed
        return grad, None


def take_parts(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Before `module` loads a state dict: of whole tensors in it, keep the part that lies here, as a DTensor.

    Without it ``load_state_dict(whole, assign=True)`` would put all experts in the place of each rank's.

    Raises:
        ValueError: the part of another rank, or one that lies otherwise.
    """
    mine = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in mine:
        value = state.get(prefix + name)
        if not isinstance(tensor, DTensor) or not isinstance(value, Tensor):
            continue
        if isinstance(value, DTensor):
            _check_part(prefix + name, value, tensor)
        elif value.shape == tensor.shape:
            state[prefix + name] = DTensor.from_local(
                value.detach()[held_slice(tensor)].clone(),  # a view would keep all of it
                tensor.device_mesh,
                tensor.placements,
                run_check=False,
                shape=tensor.shape,
                stride=tensor.stride(),
            )


def _check_part(name: str, value: DTensor, tensor: DTensor) -> None:
    if (value.device_mesh, value.placements) != (tensor.device_mesh, tensor.placements):
        raise ValueError(
            f"{name} is loaded from a DTensor with placements {value.placements} on {value.device_mesh}, and lies here "
            f"with {tensor.placements} on {tensor.device_mesh}: load with torch.distributed.checkpoint, or pass "
            "value.full_tensor()"
        )
    here = (value.device_mesh.mesh == dist.get_rank()).nonzero().flatten().tolist()
    there = list(value.device_mesh.get_coordinate() or ())
    if here and here != there:  # unpickled, a mesh still tells the place of the rank that saved it
        raise ValueError(
            f"{name} was saved by the rank at {there} of the mesh, and holds its experts; rank {dist.get_rank()} is at "
            f"{here}: save and load with torch.distributed.checkpoint"
        )
