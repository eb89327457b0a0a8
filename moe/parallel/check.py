"""`check`: find set-up mistakes that raise no error but train a wrong model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ...dispatch import mesh as axes
from ...dispatch.mesh import Meshes
from ...dispatch.torch_internals import composed_by, replicate
from ..experts.base import Experts
from ..layer import MoE, moe_layers
from ..names import called
from .alike import differences, gathered, options, values
from .place_experts import hooks_of

NAMED = 5  # parameters in one message


def check(model: nn.Module, mesh: DeviceMesh | Meshes, optimizer: Optimizer | Iterable[Optimizer]) -> None:
    """Find mistakes that raise no error but train a wrong model. Call it on every rank before the first step.

    It reads all parameters once, and gathers one line of text for each. Called again after some steps, it also finds
    parameters that have become different on different ranks. It finds:

    - an optimizer that was made before `parallelize`, or after `place_experts` without being passed to it, that lacks
      parameters, or that has plain tensors and DTensors in one group of a foreach or fused step;
    - layers that are not parallelized, or over another mesh, experts that are plain tensors, and a dispatcher that does
      not reach the ranks with the experts;
    - `fully_shard` in place of `fully_shard_experts`, or over too few ranks, and `replicate` around experts;
    - options, weights, or buffers of gates that differ between ranks.

    Args:
        model: module that the training loop calls, with its wrappers.
        mesh: mesh that `parallelize` got.
        optimizer: optimizer of all trained parameters, or several that have them together.

    Raises:
        ValueError: at least one mistake was found. The message has all mistakes of all ranks with their remedies, and
            every rank raises.
    """
    layers = moe_layers(model)
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    mine = [*_optimizers(model, optimizers), *_layers(layers, mesh), *_wrappers(model, layers, mesh)]
    group = axes.token_group(mesh)
    notes = dict(values(model, ["parameter"]))
    for name, layer in layers.items():
        notes |= dict(options(name, layer)) | dict(values(layer.gate, ["buffer"], f" of the gate of {called(name)}"))
    everyones = [(mine, notes)] if group is None else gathered((mine, notes), group)
    ranks = [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)
    found: dict[str, list[int]] = {}
    for rank, (texts, _) in zip(ranks, everyones, strict=True):
        for text in texts:
            found.setdefault(text, []).append(rank)
    lines = [text if where == ranks else f"rank {', '.join(map(str, where))}: {text}" for text, where in found.items()]
    if apart := differences([said for _, said in everyones], ranks, whole=False):
        lines.append(
            f"ranks differ: {_some(apart)}: load the same weights on every rank and, without DDP or FSDP2, call "
            "sync_gradients once a step"
        )
    if lines:
        raise ValueError("\n".join([f"{len(lines)} mistakes that raise no error by themselves:", *lines]))


def _optimizers(model: nn.Module, optimizers: list[Optimizer]) -> Iterator[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    strange = [p for p in held if id(p) not in names]
    if strange:
        yield (
            f"the optimizer has {len(strange)} parameters that the model lacks, the first of shape "
            f"{tuple(strange[0].shape)}: make it after parallelize and FSDP, which replace parameters"
        )
    has = {id(p) for p in held}
    placed = {id(p) for m in model.modules() if isinstance(m, Experts) and m.placement for p in m.parameters()}
    unaware = [optimizer for optimizer in optimizers if placed and hooks_of(optimizer) is None]
    if any(id(p) in placed for each in unaware for group in each.param_groups for p in group["params"]):
        yield (
            "the optimizer was made after place_experts, and its state dict would have experts in another order than "
            "their ids: call place_experts(model, mesh, optimizer, {}) once"
        )
    left = [names[id(p)] for p in model.parameters() if p.requires_grad and id(p) not in has]
    if left:
        yield (
            f"the optimizer lacks {_some(left)}, which would never change: make it after parallelize, from "
            "model.parameters() or param_groups(model), and call requires_grad_(False) on parameters to freeze"
        )
    for optimizer in optimizers:
        for number, group in enumerate(optimizer.param_groups):
            kinds = {isinstance(p, DTensor) for p in group["params"]}
            how = next((how for how in ("fused", "foreach") if group.get(how)), None)
            if how and len(kinds) > 1:
                yield (
                    f"group {number} of {type(optimizer).__name__}({how}=True) mixes plain tensors and DTensors, which "
                    "its step refuses: pass param_groups(model), and clip with turnout.moe.clip_grad_norm_"
                )


def _layers(layers: dict[str, MoE], mesh: DeviceMesh | Meshes) -> Iterator[str]:
    if not layers:
        yield "the model has no MoE layer: pass the model that has"
    data, expert_mesh = axes.data_mesh(mesh), axes.of_experts(mesh)
    ranks = sorted(data.mesh.flatten().tolist())
    ep = axes.axis(expert_mesh, axes.EP)
    for name, layer in layers.items():
        theirs = [] if layer.balance_group is None else sorted(dist.get_process_group_ranks(layer.balance_group))
        if len(ranks) > 1 and not theirs:
            yield f"{called(name)} is on one rank: call parallelize(model, mesh) on the whole model"
            continue
        if theirs and theirs != ranks:
            yield f"{called(name)} was parallelized over ranks {theirs}, but the mesh has {ranks}: pass the same mesh"
            continue
        if ep is None:
            continue
        holders = axes.holders(expert_mesh)
        holding, reached = sorted(holders.mesh.flatten().tolist()), layer.dispatcher.groups
        whole = [own for own, p in layer.experts.named_parameters() if not isinstance(p, DTensor)]
        if whole:
            yield (
                f"{_some(whole)} in the experts of {called(name)} is a plain tensor, so that each rank uses the first "
                "experts: assign DTensors only, and pass experts to replicate as ignored_modules"
            )
        sizes = [dist.get_world_size(group) for group in reached]
        where = {rank for group in reached for rank in dist.get_process_group_ranks(group)}
        if math.prod(sizes) != len(holding) or not where <= set(holding):
            yield (
                f"the dispatcher of {called(name)}, {type(layer.dispatcher).__name__}, exchanges with ranks "
                f"{sorted(where)} in groups of {sizes}, but its experts are on ranks {holding}: use the one that "
                "parallelize(..., dispatcher=) sets, or make one for this mesh"
            )


def _wrappers(model: nn.Module, layers: dict[str, MoE], mesh: DeviceMesh | Meshes) -> Iterator[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    experts = {id(p) for layer in layers.values() for p in layer.experts.parameters()}
    for part in model.modules():
        averaged = [names[id(p)] for p in _replicated(part) if id(p) in experts and isinstance(p, DTensor)]
        if averaged:
            yield (
                f"replicate averages {_some(averaged)} over ranks with different experts: pass it ignored_modules= "
                "with layer.experts of each layer, and call sync_gradients(model, mesh, dense=False)"
            )
        if isinstance(part, FSDPModule):
            yield from _sharded(part, names, experts, mesh)


def _replicated(module: nn.Module) -> list[nn.Parameter]:
    """Parameters whose gradients `replicate` will average. Only for `replicate`, because DDP refuses DTensors."""
    state = (composed_by(module) or {}).get("replicate") and replicate.state(module)
    if not state or not state._init_args:
        return []
    left = {id(p) for ignored in state._init_args[1] for p in ignored.parameters()}
    return [p for p in module.parameters() if id(p) not in left]


def _sharded(module: FSDPModule, names: dict[int, str], experts: set[int], given: DeviceMesh | Meshes) -> Iterator[str]:
    """Check that FSDP2 divides by the number of ranks that share the batch, and sums dense gradients over all."""
    data = axes.data_mesh(given)
    copies = given.replicas if isinstance(given, Meshes) else data
    group = module._get_fsdp_state()._fsdp_param_group
    if group is None:
        return
    own = [names[id(p.sharded_param)] for p in group.fsdp_params if id(p.sharded_param) in experts]
    dense = [names[id(p.sharded_param)] for p in group.fsdp_params if id(p.sharded_param) not in experts]
    mesh = group.mesh_info.mesh
    divisor = group.gradient_divide_factor or mesh.size()
    if own and divisor != data.size():
        yield (
            f"FSDP2 divides the gradients of {_some(own)} by {divisor:g}, but the loss is averaged over {data.size()} "
            "ranks: call fully_shard_experts(model, mesh) before fully_shard(model)"
        )
    if dense and not set(copies.mesh.flatten().tolist()) <= set(mesh.mesh.flatten().tolist()):
        yield (
            f"FSDP2 averages the gradients of {_some(dense)} over {mesh.size()} of the {copies.size()} ranks that "
            "share the batch: leave mesh out of fully_shard, or pass a mesh of all these ranks"
        )
    elif dense and copies.size() > data.size() and divisor != data.size():
        yield (
            f"FSDP2 divides the gradients of {_some(dense)} by {divisor:g}, but the loss is averaged over "
            f"{data.size()} ranks and summed over cp: call data_parallel(model, meshes)"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
