"""`place_experts`: experts change their ranks between two steps, with their optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ...dispatch import mesh as axes
from ...dispatch.mesh import Meshes
from ..experts.base import Experts
from ..experts.placed import Placement, check_alike, exchange, sizes_of, stacked
from ..experts.sharded import local
from ..layer import MoE, moe_layers
from ..names import called

Orders = Mapping[str, Sequence[int]]


def place_experts(
    model: nn.Module,
    mesh: DeviceMesh | Meshes,
    optimizer: Optimizer | Iterable[Optimizer] | None,
    orders: Orders | None,
) -> None:
    """Move experts to other ranks, between two steps. Call it on every rank.

    Parameters, buffers, gradients and optimizer state of an expert move together, in place, by one all-to-all for each
    layer. Only experts that change their rank travel. What the model computes does not change, and expert ids stay
    global everywhere: in routings, statistics, `MoE.shadow`, ``layer.experts[e]`` and `load`. State dicts of model and
    optimizer keep the order of global ids, so checkpoints load under any placement and on any mesh.

    With a placement, ``state_dict`` and ``load_state_dict`` of model and optimizer exchange experts, so all ranks call
    them. A parameter itself has its experts in the order of ``layer.experts.order``.

    Args:
        model: model that `parallelize` got, or in a pipeline a stage of it.
        mesh: mesh that `parallelize` got.
        optimizer: the optimizer that trains the experts, or several that do together. None if there is none yet: pass
            one that is made later to another call.
        orders: for each name in ``model.named_modules()`` of an MoE layer, the global id of the expert in each slot, as
            `plan_placement` gives it. Rank r of W gets the experts in slots [r*E/W, (r+1)*E/W). Layers left out stay as
            they are. None brings all experts back to where `parallelize` has put them. Where one rank has all experts
            of a layer, nothing moves.

    Raises:
        ValueError: no such layer, an order that does not have each expert once, a layer that is not parallelized,
            an optimizer that lacks expert parameters, a tensor that cannot be moved, or arguments that differ between
            ranks. Every rank raises, and nothing has moved.
        DispatchError: the exchange failed. Load a checkpoint before training goes on.

    Examples:
        Every few hundred steps, with experts over 4 ranks::

            orders = {
                name: plan_placement(counted.tokens_per_expert, ranks=4, current=layers[name].experts.order).order
                for name, counted in load(model, mesh).items()
            }
            place_experts(model, mesh, optimizer, orders)
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    moves: list[_Move] = []
    fault: Exception | None = None
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation the root is whole
    try:
        moves = list(_moves(moe_layers(model), optimizers, orders))
    except Exception as error:  # of any kind: the other ranks wait for this one
        fault = error
    everyone = axes.token_group(mesh)
    if everyone is not None:
        notes = {key: said for move in moves for key, said in move.notes()}
        check_alike(notes | {"the number of optimizers": str(len(optimizers))}, fault, everyone, "place_experts")
    elif fault is not None:
        raise fault
    for move in moves:
        move.make()
    for each in optimizers:
        keep_global_order(each, model)


def keep_global_order(optimizer: Optimizer, model: nn.Module) -> None:
    """Let state dicts of an optimizer have the experts of a model in the order of global ids, if some are placed."""
    hooks, experts = hooks_of(optimizer), [module for module in model.modules() if isinstance(module, Experts)]
    if hooks is None and not any(each.placement for each in experts):
        return
    if hooks is None:
        hooks = vars(optimizer)["_global_order"] = _GlobalOrder()  # a copy of the optimizer loses it, as it does hooks
        optimizer.register_state_dict_post_hook(hooks.after_state_dict)
        optimizer.register_load_state_dict_pre_hook(hooks.before_load)
    hooks.experts = [*dict.fromkeys([*hooks.experts, *experts])]


def hooks_of(optimizer: Optimizer) -> _GlobalOrder | None:
    """What `keep_global_order` has added to an optimizer, or None."""
    return vars(optimizer).get("_global_order")


class _GlobalOrder:
    """Hooks of an optimizer, whose state has experts in their slots, and whose state dicts have them by global ids."""

    def __init__(self) -> None:
        self.experts: list[Experts] = []

    def after_state_dict(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return self._reordered(optimizer, state, Placement.to_global)

    def before_load(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return self._reordered(optimizer, state, Placement.to_slots)

    def _reordered(self, optimizer: Optimizer, state: dict[str, Any], reorder: Any) -> dict[str, Any]:
        index = {
            id(p): number
            for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=False)
            for number, p in zip(saved["params"], group["params"], strict=False)  # torch says what does not fit
        }
        values: dict[Any, dict[str, Any]] = {number: dict(each) for number, each in state["state"].items()}
        for experts in self.experts:
            if experts.placement is None:
                continue
            found: dict[str, tuple[dict[str, Any], str]] = {}  # name for errors: where the tensor stands
            fault = None
            try:
                for own, p in experts.named_parameters():
                    held = values.get(index.get(id(p)), {})
                    found |= {f"{key} of {own}": (held, key) for key in stacked_state(held, own, p)}
            except ValueError as error:
                fault = error
            tensors = {name: held[key] for name, (held, key) in found.items()}
            for name, tensor in reorder(experts.placement, tensors, "an optimizer's state of experts", fault).items():
                held, key = found[name]
                held[key] = tensor
        return {**state, "state": values}


@dataclass(frozen=True)
class _Move:
    """Experts that get another order.

    Attributes:
        experts: the experts.
        where: words for their layer.
        group: ranks that share them; None if one rank has all.
        after: the order that they get.
        tensors: what moves, by words for errors.
    """

    experts: Experts
    where: str
    group: ProcessGroup | None
    after: tuple[int, ...]
    tensors: dict[str, Tensor]

    def notes(self) -> Iterator[tuple[str, str]]:
        yield f"the order of {self.where}", f"{list(self.experts.order)} now and {list(self.after)} then"
        yield from sizes_of(self.tensors).items()

    def make(self) -> None:
        if self.group is None:
            return
        with torch.no_grad():
            exchange([local(t) for t in self.tensors.values()], self.experts.order, self.after, self.group)
        home = self.after == tuple(range(len(self.after)))
        self.experts.placement = None if home else Placement(self.after, self.group)


def _moves(layers: dict[str, MoE], optimizers: list[Optimizer], orders: Orders | None) -> Iterator[_Move]:
    """The moves of all experts, also of those that stay.

    Raises:
        ValueError: as `place_experts`.
    """
    if strange := [name for name in orders or () if name not in layers]:
        known = ", ".join(map(repr, layers))
        raise ValueError(f"orders has {strange[0]!r}, which is no MoE layer of the model: its layers are {known}")
    homes = {name: tuple(range(layer.num_experts)) for name, layer in layers.items()}
    wanted: dict[Experts, tuple[str, tuple[int, ...]]] = {}
    for name, order in (homes if orders is None else orders).items():
        experts, ids = layers[name].experts, tuple(int(expert) for expert in order)
        if sorted(ids) != list(homes[name]):
            raise ValueError(
                f"the order of {called(name)} must have each of the experts 0 to {len(homes[name]) - 1} once; got "
                f"{list(ids)}"
            )
        first, same = wanted.setdefault(experts, (name, ids))
        if same != ids:
            raise ValueError(f"{called(first)} and {called(name)} share their experts: give both the same order")
    moved: dict[int, tuple[str, Any]] = {}  # tensors that several experts share move once
    for experts, (name, layer) in {layer.experts: (name, layer) for name, layer in layers.items()}.items():
        if layer.weights is None:
            raise ValueError(f"{called(name)} is on one rank: call parallelize(model, mesh) first")
        after, group = wanted.get(experts, (name, experts.order))[1], layer.weights.ep
        tensors = {} if group is None else dict(_tensors(experts, called(name), optimizers))
        for key, tensor in list(tensors.items()):
            first, order = moved.setdefault(id(tensor), (key, after))
            if order != after:
                raise ValueError(f"{first} and {key} are one tensor: give their layers the same order")
            if first != key:
                del tensors[key]
        yield _Move(experts, called(name), group, after, tensors)


def _tensors(experts: Experts, where: str, optimizers: list[Optimizer]) -> Iterator[tuple[str, Tensor]]:
    """All that moves with the experts of a layer, with words for it."""
    owners = {id(p): each for each in optimizers for group in each.param_groups for p in group["params"]}
    for own, tensor in stacked(experts):
        name = f"{own} of {where}"
        _check_movable(name, tensor, tensor)
        yield name, tensor
        if not isinstance(tensor, nn.Parameter):
            continue
        owner = owners.get(id(tensor))
        if tensor.requires_grad and owner is None and (optimizers or tensor.grad is not None):
            raise ValueError(f"no optimizer has {name}: pass all optimizers that train the experts to place_experts")
        if tensor.grad is not None:
            _check_movable(f"the gradient of {name}", tensor.grad, tensor)
            yield f"the gradient of {name}", tensor.grad
        state = {} if owner is None else owner.state.get(tensor, {})
        yield from ((f"{key} of {name}", state[key]) for key in stacked_state(state, name, tensor))


def stacked_state(state: dict[str, Any], name: str, p: Tensor) -> list[str]:
    """Keys of an optimizer's state of a parameter that have tensors stacked over the experts, like the parameter.

    Raises:
        ValueError: the state has something that is neither this nor one number.
    """
    keys = []
    for key, value in state.items():
        if isinstance(value, Tensor) and value.numel() > 1:
            _check_movable(f"{key}, which the optimizer keeps for {name},", value, p)
            keys.append(key)
        elif not isinstance(value, Tensor | int | float | str | None):
            raise ValueError(
                f"the optimizer keeps {key} for {name}, a {type(value).__name__}, whose part of each expert is not "
                "known: use an optimizer whose state is tensors shaped like the parameter"
            )
    return keys


def _check_movable(name: str, tensor: Any, p: Tensor) -> None:
    """Raise ValueError unless a tensor is stacked over the experts, and lies on the ranks as the parameter p does."""
    here = local(tensor.detach())
    if isinstance(tensor, DTensor) and isinstance(p, DTensor):
        experts, ranks = tensor.shape[0], 1
        alike = (tensor.device_mesh, tensor.placements) == (p.device_mesh, p.placements)
        for axis, size in zip(axes.names(tensor.device_mesh), tensor.device_mesh.shape, strict=True):
            ranks *= size if axis in (axes.EP, axes.NODE, axes.LOCAL) else 1
        plain = type(here) is Tensor and here.device.type == tensor.device_mesh.device_type
        if alike and plain and experts == p.shape[0] and len(here) * ranks == experts:
            return
    kind = f"a {type(tensor).__name__} {list(tensor.shape)}, of which {list(here.shape)} on {here.device} is here"
    raise ValueError(
        f"{name} is {kind}: experts move if each rank has whole rows of axis 0, as parallelize and fully_shard_experts "
        "make them; call place_experts after the optimizer's step"
    )
