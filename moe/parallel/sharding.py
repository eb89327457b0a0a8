"""Shard stacked expert tensors over a mesh: `shares` plans it for all layers, and `spread` does it for one tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ...dispatch import mesh as axes
from ..layer import MoE
from ..names import called


@dataclass
class Share:
    """Plan for one stacked tensor: how to shard it, and all modules that have it (several if it is tied).

    Attributes:
        tensor: tensor stacked over all experts.
        mesh: mesh over which it is sharded.
        split: axis of the tensor that is split, for each axis of the mesh.
        where: its name in words, for errors.
        places: modules that have it, and its name in each.
    """

    tensor: Tensor
    mesh: DeviceMesh
    split: tuple[int, ...]
    where: str
    places: list[tuple[nn.Module, str]]


def shares(model: nn.Module, layers: dict[str, MoE], mesh: DeviceMesh) -> list[Share]:
    """Plan how to spread the experts of all layers over a mesh (`axes.holders`), without changing anything.

    Tensors or whole experts that layers share are sharded once, and stay shared.

    Raises:
        ValueError: experts that are spread already, that do not split, or that share a tensor with other modules.
    """
    found: dict[int, Share] = {}
    for name, layer in layers.items():
        _check(name, layer, mesh)
        sliced = layer.experts.split_axes() if axes.ETP in axes.names(mesh) else {}
        for own, tensor, module in _tensors(layer.experts):
            where = f"{own} of {called(name)}"
            split = tuple(sliced[own] if axis == axes.ETP else 0 for axis in axes.names(mesh))
            share = found.setdefault(id(tensor), Share(tensor, mesh, split, where, []))
            if share.split != split:
                raise ValueError(
                    f"{share.where} and {where} are one tensor, but would be split on different axes: give one a copy"
                )
            share.places.append((module, own.rpartition(".")[2]))
            _check_split(where, tensor, split, mesh)
    inside = {id(module) for share in found.values() for module, _ in share.places}
    for own, tensor, module in _tensors(model):
        if id(tensor) in found and id(module) not in inside:
            raise ValueError(
                f"{found[id(tensor)].where} is the same tensor as {own} outside the experts, and cannot stay shared "
                "when experts are spread: give one of them a copy"
            )
    return list(found.values())


@torch.no_grad()
def spread(share: Share) -> None:
    """Replace a tensor, in all modules that have it, by a DTensor with this rank's part."""
    held, mesh = share.tensor.detach(), share.mesh
    for axis, place, at in zip(axes.names(mesh), mesh.get_coordinate() or (), share.split, strict=True):
        held = held.chunk(mesh[axis].size(), at)[place]
    part = held.clone(memory_format=torch.contiguous_format)  # a view would keep all experts; FSDP2 wants no gaps
    new: Tensor = DTensor.from_local(part, mesh, [Shard(at) for at in share.split], run_check=False)
    if isinstance(share.tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=share.tensor.requires_grad)
    for module, name in share.places:
        setattr(module, name, new)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor, nn.Module]]:
    """All parameters and buffers with their names and modules. Tied ones appear once for each module."""
    return [
        (f"{prefix}.{own}" if prefix else own, tensor, part)
        for prefix, part in module.named_modules(remove_duplicate=False)
        for own, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None
    ]


def _check(name: str, layer: MoE, mesh: DeviceMesh) -> None:
    if any(isinstance(p, DTensor) for p in layer.experts.parameters()):
        raise ValueError(f"the experts of {called(name)} are spread already: call parallelize once, before FSDP")
    ep = math.prod(mesh[axis].size() for axis in axes.names(mesh) if axis != axes.ETP)
    if layer.num_experts % ep:
        raise ValueError(
            f"num_experts={layer.num_experts} of {called(name)} does not split over ep={ep} ranks: use a multiple of "
            f"{ep}, or a mesh whose ep axis divides {layer.num_experts}"
        )


def _check_split(where: str, tensor: Tensor, split: tuple[int, ...], mesh: DeviceMesh) -> None:
    size = list(tensor.shape)
    for axis, at in zip(axes.names(mesh), split, strict=True):
        if size[at] % mesh[axis].size():
            raise ValueError(
                f"{where}, {tuple(tensor.shape)}, does not split over {axis}={mesh[axis].size()} on axis {at}: change "
                "its size or the mesh"
            )
        size[at] //= mesh[axis].size()
