"""Where each tensor of a family's files lies in a bridged model, spread over ranks or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...moe.experts.placed import check_home
from ...moe.experts.sharded import held_slice, local
from .block_experts import DbrxExperts, ListedExperts
from .bridged import BridgedMoE, find_bridged

Region = tuple[slice, ...]  # one slice per axis


@dataclass(frozen=True)
class Slot:
    """The parameter or buffer of the model that holds a tensor of a file.

    Attributes:
        tensor: the model's tensor, plain or a DTensor.
        expert: id of the expert whose part ``tensor[expert]`` the file has. None, the default: the file has all.
        transposed: whether the last two axes are swapped in the file; False by default.
        flat: whether the first two axes are one axis in the file; False by default.
    """

    tensor: Tensor
    expert: int | None = None
    transposed: bool = False
    flat: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the file's tensor."""
        return tuple(self.of_file(torch.empty(self.tensor.shape, device="meta")).shape)

    @property
    def region(self) -> Region | None:
        """The part of the file's tensor that this rank holds, one slice per axis; None if it holds nothing of it."""
        held = held_slice(self.tensor)
        if any(part.start >= part.stop for part in held):
            return None
        if self.expert is not None:
            if not held[0].start <= self.expert < held[0].stop:
                return None
            held = held[1:]
        if self.transposed:
            held = (*held[:-2], held[-1], held[-2])
        if self.flat:
            height = self.tensor.shape[1]
            held = (slice(held[0].start * height, held[0].stop * height), *held[2:])
        return held

    @property
    def here(self) -> range:
        """Indices on axis 0 of the model's tensor that this rank holds."""
        return range(held_slice(self.tensor)[0].start, held_slice(self.tensor)[0].stop)

    @property
    def held(self) -> Tensor:
        """This rank's part of the file's tensor (`region`), with its current values."""
        here = local(self.tensor.detach())
        part = here if self.expert is None else here[self.expert - held_slice(self.tensor)[0].start]
        part = part.mT if self.transposed else part
        return part.flatten(0, 1) if self.flat else part

    def of_expert(self, expert: int) -> Slot:
        """The slot of one expert's part."""
        return replace(self, expert=expert)

    @torch.no_grad()
    def put(self, part: Tensor) -> None:
        """Copy this rank's part of the file's tensor (`region`) into the model's tensor, in its dtype."""
        held, to = held_slice(self.tensor), local(self.tensor)
        if self.flat:
            part = part.unflatten(0, (-1, self.tensor.shape[1]))[:, held[1]]
        if self.transposed:
            part = part.mT
        (to if self.expert is None else to[self.expert - held[0].start]).copy_(part)

    def of_file(self, whole: Tensor) -> Tensor:
        """The file's tensor, from the whole model tensor."""
        part = whole if self.expert is None else whole[self.expert]
        part = part.mT if self.transposed else part
        return part.flatten(0, 1) if self.flat else part


@contextmanager
def family_view(model: nn.Module) -> Iterator[nn.Module]:
    """Context in which the family's own blocks are in the model, so that parameters have the family's names.

    Their tensors are the current ones, spread over ranks as they are. The blocks cannot compute.
    """
    layers = find_bridged(model)
    for parent, name, layer in layers:
        setattr(parent, name, layer.block)
    try:
        yield model
    finally:
        for parent, name, layer in layers:
            setattr(parent, name, layer)


def family_slots(model: nn.Module) -> dict[str, Slot]:
    """Slots of all tensors in the family's `state_dict`, by their names there."""
    check_home(model, "weights are read or written in the family's format")
    places: dict[int, Slot] = {}
    for _, _, layer in find_bridged(model):
        experts = layer.experts
        if isinstance(experts, ListedExperts):  # the family's modules are empty, and the stack has their tensors
            for expert, module in enumerate(experts._modules_of_family[0].values()):
                for name, p in module.named_parameters():
                    places[id(p)] = Slot(experts.module.get_parameter(name), expert)
        elif isinstance(experts, DbrxExperts):
            places |= {id(p): Slot(p, flat=True) for p in experts.module.parameters()}
    with family_view(model):
        state = model.state_dict(keep_vars=True)
    return {name: places.get(id(t), Slot(t)) for name, t in state.items() if isinstance(t, Tensor)}


def give_memory(model: nn.Module, device: torch.device | str) -> None:
    """Allocate all parameters that are on the meta device, without values. Tied and sharded ones stay so."""
    emptied = {id(m) for _, _, layer in find_bridged(model) for m in _emptied(layer)}
    blocks = (module for _, _, layer in find_bridged(model) for module in layer.block.modules())
    new: dict[nn.Parameter, nn.Parameter] = {}
    for module in dict.fromkeys([*model.modules(), *blocks]):
        for name, p in module._parameters.items() if id(module) not in emptied else ():
            if p is None or not p.is_meta:
                continue
            if p not in new:
                new[p] = nn.Parameter(_empty(p, device), requires_grad=p.requires_grad)
            module._parameters[name] = new[p]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != torch.device(device) and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def _empty(p: Tensor, device: torch.device | str) -> Tensor:
    held = torch.empty(local(p).shape, dtype=p.dtype, device=device)
    if not isinstance(p, DTensor):
        return held
    return DTensor.from_local(held, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def _emptied(layer: BridgedMoE) -> Iterator[nn.Module]:
    if isinstance(layer.experts, ListedExperts):
        yield from layer.experts._modules_of_family[0].modules()
