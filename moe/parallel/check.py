"""Mistakes that raise no error: one call that looks for them, on all ranks together."""

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
from ..build import called
from ..layer import MoE
from .alike import differences, gathered, options, values
from .parallelize import moe_layers

NAMED = 5  # parameters in one message


def check(model: nn.Module, mesh: DeviceMesh | Meshes, optimizer: Optimizer | Iterable[Optimizer]) -> None:
    """Look for mistakes that raise no error and train a wrong model; call it on every rank, before the first step.

    It reads all parameters once and costs about as much as an all-gather of a line for each. Called again after some
    steps, it also notices parameters that have drifted apart. What it looks for:

    - the optimizer: made before `parallelize`, parameters it lacks, plain tensors and DTensors in one group of a
      foreach or fused one;
    - layers: not parallelized, or over another mesh; whole experts where others are spread; a dispatcher, set by hand,
      that does not reach the ranks which have the experts;
    - wrappers: `fully_shard` in place of `fully_shard_experts`, or over too few ranks; DDP or `replicate` around
      experts; DDP that overwrites the loads by which gates balance themselves;
    - ranks that disagree: other options, weights, or buffers of gates.

    Args:
        model: what the training loop calls, with its wrappers.
        mesh: as given to `parallelize`.
        optimizer: of all its parameters, or several that have them together.

    Raises:
        ValueError: on every rank, all that was found on any, each with what to do instead.
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
            f"ranks differ: {_some(apart)}; load the same weights on every rank and, without DDP or FSDP2, call "
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
            f"the optimizer holds {len(strange)} parameters that are not the model's, the first of shape "
            f"{tuple(strange[0].shape)}: make it after parallelize and FSDP, which put new parameters in their place"
        )
    has = {id(p) for p in held}
    left = [names[id(p)] for p in model.parameters() if p.requires_grad and id(p) not in has]
    if left:
        yield (
            f"the optimizer lacks {_some(left)}, which would never learn: make it after parallelize, of "
            "model.parameters() or param_groups(model), and call requires_grad_(False) on what is to stay"
        )
    for optimizer in optimizers:
        for number, group in enumerate(optimizer.param_groups):
            kinds = {isinstance(p, DTensor) for p in group["params"]}
            how = next((how for how in ("fused", "foreach") if group.get(how)), None)
            if how and len(kinds) > 1:
                yield (
                    f"group {number} of {type(optimizer).__name__}({how}=True) mixes plain tensors and DTensors, which "
                    "its step refuses: pass param_groups(model), and clip by turnout.moe.clip_grad_norm_"
                )


def _layers(layers: dict[str, MoE], mesh: DeviceMesh | Meshes) -> Iterator[str]:
    if not layers:
        yield "the model has no MoE layer: check the one that has"
    data, expert_mesh = axes.data_mesh(mesh), axes.of_experts(mesh)
    ranks = sorted(data.mesh.flatten().tolist())
    ep = axes.axis(expert_mesh, axes.EP)
    for name, layer in layers.items():
        theirs = [] if layer.balance_group is None else sorted(dist.get_process_group_ranks(layer.balance_group))
        if len(ranks) > 1 and not theirs:
            yield f"{called(name)} is on one rank: call parallelize(model, mesh) on the whole model"
            continue
        if theirs and theirs != ranks:
            yield f"{called(name)} was parallelized over ranks {theirs}, and the mesh has {ranks}: pass the same mesh"
            continue
        if ep is None:
            continue
        holders = axes.holders(expert_mesh)
        holding, reached = sorted(holders.mesh.flatten().tolist()), layer.dispatcher.groups
        whole = [own for own, p in layer.experts.named_parameters() if not isinstance(p, DTensor)]
        if whole:
            yield (
                f"{_some(whole)} of the experts of {called(name)} is no DTensor, so that each rank would compute with "
                "the first experts: do not assign plain tensors, and keep replicate from experts (ignored_modules)"
            )
        sizes = [dist.get_world_size(group) for group in reached]
        where = {rank for group in reached for rank in dist.get_process_group_ranks(group)}
        if math.prod(sizes) != len(holding) or not where <= set(holding):
            yield (
                f"the dispatcher of {called(name)}, {type(layer.dispatcher).__name__}, exchanges with ranks "
                f"{sorted(where)} in groups of {sizes}, and its experts lie on ranks {holding}: take the one that "
                "parallelize(..., dispatcher=) sets, or make one of this mesh"
            )


def _wrappers(model: nn.Module, layers: dict[str, MoE], mesh: DeviceMesh | Meshes) -> Iterator[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    experts = {id(p) for layer in layers.values() for p in layer.experts.parameters()}
    for part in model.modules():
        averaged = [names[id(p)] for p in _replicated(part) if id(p) in experts and isinstance(p, DTensor)]
        if averaged:
            yield (
                f"replicate averages {_some(averaged)} over ranks that hold different experts: pass it ignored_modules="
                "[layer.experts], of each layer, and call sync_gradients(model, mesh, dense=False)"
            )
        if isinstance(part, FSDPModule):
            yield from _sharded(part, names, experts, axes.data_mesh(mesh))


def _replicated(module: nn.Module) -> list[nn.Parameter]:
    """Parameters whose gradients `replicate` will average, before its first forward; DDP itself refuses DTensors."""
    state = (composed_by(module) or {}).get("replicate") and replicate.state(module)
    if not state or not state._init_args:
        return []
    left = {id(p) for ignored in state._init_args[1] for p in ignored.parameters()}
    return [p for p in module.parameters() if id(p) not in left]


def _sharded(module: FSDPModule, names: dict[int, str], experts: set[int], data: DeviceMesh) -> Iterator[str]:
    """By what FSDP2 divides gradients, and over whom it sums them: the ranks over which the loss is averaged."""
    group = module._get_fsdp_state()._fsdp_param_group
    if group is None:
        return
    own = [names[id(p.sharded_param)] for p in group.fsdp_params if id(p.sharded_param) in experts]
    dense = [names[id(p.sharded_param)] for p in group.fsdp_params if id(p.sharded_param) not in experts]
    mesh = group.mesh_info.mesh
    divisor = group.gradient_divide_factor or mesh.size()
    if own and divisor != data.size():
        yield (
            f"FSDP2 divides the gradients of {_some(own)} by {divisor:g}, and the loss is averaged over {data.size()} "
            "ranks: call fully_shard_experts(model, mesh) before fully_shard(model)"
        )
    if dense and not set(data.mesh.flatten().tolist()) <= set(mesh.mesh.flatten().tolist()):
        yield (
            f"FSDP2 averages the gradients of {_some(dense)} over {mesh.size()} of the {data.size()} ranks that share "
            "the batch: leave mesh out of fully_shard, or pass one of all of them"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
