"""Placement: the experts of a model over the ranks of a mesh."""

from __future__ import annotations

import secrets
import warnings
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ...dispatch import mesh as axes
from ...dispatch.autoselect.auto import AutoDispatcher
from ...dispatch.autoselect.profile import Profile
from ...dispatch.compressed import CompressedDispatcher
from ...dispatch.dispatcher import Dispatcher, NodeLocalDispatcher, SteppedDispatcher
from ...dispatch.expert_tp import TensorParallelDispatcher
from ...dispatch.flat import FlatDispatcher
from ...dispatch.hierarchical import HierarchicalDispatcher
from ...dispatch.local import LocalDispatcher
from ...dispatch.mesh import Meshes
from ...dispatch.node import NodeDispatcher
from ...dispatch.overlap import OverlapDispatcher
from ...dispatch.place import Place
from ...dispatch.wire import WIRES, Wire
from ..build import called
from ..experts.base import Experts
from ..experts.sharded import local
from ..layer import MoE
from .alike import agree
from .sharding import shares, spread
from .weight_travel import WeightTravel

BY_NODE: dict[str, type[NodeLocalDispatcher]] = {"2dh": HierarchicalDispatcher, "node": NodeDispatcher}
DISPATCHERS = ("auto", "flat", *BY_NODE)
Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: Model,
    mesh: DeviceMesh | Meshes,
    dispatcher: str | Dispatcher = "auto",
    profile: str | Path | Profile | None = None,
    overlap: int | Literal["auto"] | None = None,
    wire: Wire | None = None,
    timeout: timedelta | float | None = None,
    parallelism: int | None = None,
) -> Model:
    """Spread the experts of every `MoE` in a model over ranks, in place; call it on every rank.

    Rank r of the axis keeps experts [r*L, (r+1)*L) as DTensors sharded on axis 0. Nothing is scaled:
    after backward, expert gradients are sums over the ranks that sent tokens (`sync_gradients`). Parameters of
    the experts are new objects: make the optimizer afterwards. Experts and parameters that layers share stay shared.
    An error leaves the model as it was, on every rank.

    Args:
        model: alike on every rank: built under one `torch.manual_seed` or with the same weights; on the meta device,
            where there are no weights, with the same `seed` of experts. One without `MoE` layers is warned of.
        mesh: one mesh whose axes are told by name: ``"ep"`` (or ``"node"`` and ``"local"``), over which
            experts are spread, ``"edp"``, over which they are repeated, and ``"etp"``, over which the hidden
            width of each is split (`TensorParallelDispatcher`); each rank of it has a part of the batch.
            Without an "ep" axis all experts stay where they are. Or `Meshes`: with tp, each rank has a part of
            every sequence of its part of the batch, which `tensor_parallel` sees to.
        dispatcher: ``"flat"``, ``"auto"``, or a `Dispatcher`. On a mesh with "node" and "local" also ``"2dh"``
            (`HierarchicalDispatcher`) and ``"node"`` (`NodeDispatcher`). There "auto" takes the fastest of these, in 1,
            2 or 4 chunks, by measured costs (`AutoDispatcher`; with "etp" in one); elsewhere it is flat, in one piece.
        profile: those costs, or the file in which ``python -m turnout.dispatch.autoselect.probe`` saved them; None
            measures now, which takes about a second. Used by "auto" alone.
        overlap: chunks of a batch, which travel while others are computed (`OverlapDispatcher`); ``"auto"`` tries 1,
            2 and 4 in the first training steps. None: one, or as many as ``dispatcher="auto"`` has chosen.
        wire: ``"bf16"`` or ``"fp8"``: rows travel in fewer bytes (`CompressedDispatcher`). None: as they are. Where one
            rank has all experts nothing travels, and neither this nor `overlap` has an effect on a named dispatcher.
        timeout: how long a collective of the mesh's groups may wait for a rank, in seconds or as a timedelta; None: as
            long as `Meshes.of` or else `init_process_group` was told. torch's own for groups of a mesh: 30 minutes.
        parallelism: r of every layer at first (`WeightTravel`, `MoE.parallelism`). 0: experts come to their tokens. On
            a mesh with "etp" = s > 1 any divisor of s: each token visits r ranks of an expert, and s / r ranks share
            one slice. None: s, or 1 without "etp", with which no weights travel.

    Raises:
        ValueError: axes missing or unknown, experts that do not split or that share a parameter with the rest of the
            model, layers that differ between ranks (in options, weights, or buffers of a gate), a profile that does not
            fit, an overlap or a wire that is none or that the given `Dispatcher` has already, tokens that tp ranks
            would repeat, a timeout that is not positive.
        TypeError: a wire for a `Dispatcher` whose rows cannot be reached (no `SteppedDispatcher`).
    """
    _check_options(dispatcher, overlap, wire)
    axes.seconds(timeout)  # raises on what is no time
    everyone, batch, sequence = axes.token_group(mesh), axes.data_group(mesh), axes.sequence_group(mesh)
    if sequence is not None and not any(_split(p, axes.TP) for p in model.parameters()):
        raise ValueError(
            'tp > 1, but nothing is split over "tp": every tp rank would send all tokens; call '
            'tensor_parallel(model, meshes.dense["tp"]) first'
        )
    given, mesh = mesh, axes.of_experts(mesh)
    if isinstance(dispatcher, str) and dispatcher in BY_NODE:
        axes.node_and_local(mesh)  # raises on a mesh without them, also where nothing is to be spread
    ep = axes.axis(mesh, axes.EP)
    axes.set_timeout(given, timeout)
    if isinstance(dispatcher, str):
        dispatcher = _named(dispatcher, mesh, ep, profile)
        if isinstance(dispatcher, LocalDispatcher):
            overlap = wire = None

    def work_of(layer: MoE) -> float:
        return layer.experts.row_flops if isinstance(dispatcher, AutoDispatcher) else 0.0

    layers, holders = moe_layers(model), None if ep is None else axes.holders(mesh)
    if not layers and not axes.staged(given):  # a stage of a pipeline may have none
        warnings.warn(
            f"{type(model).__name__} has no MoE layer: parallelize changes nothing; call it on the model that has some",
            stacklevel=2,
        )
    planned, fault, weights = [], None, WeightTravel(None, None, 1)
    dispatchers: dict[float, Dispatcher] = {}  # what chooses by costs is shared by layers whose experts cost the same
    try:
        if holders is not None:
            planned = shares(model, layers, holders)
            weights = WeightTravel.of(mesh)
            dispatchers = {work: _equipped(dispatcher, work, overlap, wire) for work in map(work_of, layers.values())}
        for name, layer in layers.items():
            weights = weights.choose(layer.num_experts, called(name), parallelism)
    except (ValueError, TypeError) as error:
        fault = error
    options = {"overlap": repr(overlap), "wire": repr(wire), "the dispatcher": type(dispatcher).__name__}
    options["parallelism"] = repr(parallelism)
    agree(layers, options, fault, everyone, "before parallelize, which every rank calls with the same arguments")

    for share in planned:
        spread(share)
    for layer in layers.values():
        layer.balance_group, layer.sequence_group = batch, sequence
        if holders is not None:
            layer.dispatcher = dispatchers[work_of(layer)]
    _number(layers, everyone)
    for layer in layers.values():
        layer.weights = weights
        layer.parallelism = weights.parallelism
    return model


def fully_shard_experts(model: Model, mesh: DeviceMesh | Meshes, **options: Any) -> Model:
    """FSDP2 for the experts of a parallelized model, over the axis "edp", with the right divisor.

    Then wrap the rest: ``fully_shard(model, mesh=...)`` over all ranks of the mesh. FSDP averages
    over the ranks that hold an expert, while the loss is averaged over all ranks that have a part of the
    batch: the divisor says so. `options` go to `torch.distributed.fsdp.fully_shard`.

    Raises:
        ValueError: a mesh without "edp" and "ep", parameters that layers share or that split on no axis, gradients
            that FSDP2 would divide twice.
    """
    averaged, mesh = axes.data_mesh(mesh).size(), axes.of_experts(mesh)
    edp = axes.axis(mesh, axes.EDP)
    if edp is None or axes.axis(mesh, axes.EP) is None:
        raise ValueError(f"fully_shard_experts needs the axes edp (1 will do) and ep; the mesh has {axes.names(mesh)}")
    policy = options.get("mp_policy", MixedPrecisionPolicy())
    place = partial(_fsdp_axis, ranks=edp.size())
    layers = moe_layers(model)
    _check_untied(layers)
    for name, p in expert_parameters(model).items() if "shard_placement_fn" not in options else ():
        if place(p) is None:
            raise ValueError(
                f"{name}, of which a rank has {tuple(local(p).shape)}, does not split over edp={edp.size()} on any "
                "axis: take sizes that do, another edp, or sync_gradients in place of FSDP2"
            )
    for experts in dict.fromkeys(layer.experts for layer in layers.values()):
        reduced = policy.reduce_dtype or policy.param_dtype or next(experts.parameters()).dtype
        if edp.size() == 1 and reduced not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"with edp=1, FSDP2 divides {reduced} gradients twice (torch 2.13); pass "
                "mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32)"
            )
        wrapped = cast(FSDPModule, fully_shard(experts, mesh=edp, **{"shard_placement_fn": place, **options}))
        wrapped.set_gradient_divide_factor(float(averaged))
        # gloo has no scaled sum; with one rank to reduce over, forcing plain sums divides twice (torch 2.13)
        wrapped.set_force_sum_reduction_for_comms(edp.size() > 1)
    return model


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model, by name, that belong to `MoE` experts: what DDP must be told to ignore."""
    return {
        f"{name}.experts.{own}" if name else f"experts.{own}": p
        for name, layer in moe_layers(model).items()
        for own, p in layer.experts.named_parameters()
    }


def _named(name: str, mesh: DeviceMesh, ep: DeviceMesh | None, profile: str | Path | Profile | None) -> Dispatcher:
    if name not in DISPATCHERS:
        raise ValueError(f"dispatcher must be one of {', '.join(DISPATCHERS)} or a Dispatcher; got {name!r}")
    etp = axes.axis(mesh, axes.ETP)
    if ep is not None and etp is not None and etp.size() > 1:
        inner = _named(name, mesh[tuple(axis for axis in axes.names(mesh) if axis != axes.ETP)], ep, profile)
        inner = FlatDispatcher(ep.get_group()) if isinstance(inner, LocalDispatcher) else inner
        if isinstance(inner, AutoDispatcher):  # it knows nothing of the travel inside the group: no chunks of its own
            inner = replace(inner, degrees=(1,))
        return TensorParallelDispatcher(cast(SteppedDispatcher, inner), etp.get_group())
    if ep is None or ep.size() == 1:
        return LocalDispatcher()
    by_node = {axes.NODE, axes.LOCAL} <= set(axes.names(mesh)) and axes.EP not in axes.names(mesh)
    if name == "auto" and by_node:
        return AutoDispatcher.of(mesh, profile)
    return BY_NODE[name].of(mesh) if name in BY_NODE else FlatDispatcher(ep.get_group())


def _split(p: Tensor, axis: str) -> bool:
    return isinstance(p, DTensor) and axis in axes.names(p.device_mesh)


def _check_options(dispatcher: str | Dispatcher, overlap: Any, wire: Any) -> None:
    number = isinstance(overlap, int) and not isinstance(overlap, bool) and overlap > 0
    if overlap not in (None, "auto") and not number:
        raise ValueError(f'overlap must be None, "auto" or a positive integer; got {overlap!r}')
    if wire is not None and wire not in WIRES:
        raise ValueError(f"wire must be None or one of {', '.join(WIRES)}; got {wire!r}")
    if overlap is not None and isinstance(dispatcher, OverlapDispatcher):
        raise ValueError(f"overlap={overlap!r}, but the dispatcher overlaps already: leave one of them out")
    if wire is not None and isinstance(dispatcher, CompressedDispatcher):
        raise ValueError(f"wire={wire!r}, but the dispatcher compresses already: leave one of them out")


def _equipped(
    dispatcher: Dispatcher, row_flops: float, overlap: int | Literal["auto"] | None, wire: Wire | None
) -> Dispatcher:
    """With the overlap and the wire asked for; one that chooses by costs knows of them, and of the experts' work."""
    if isinstance(dispatcher, AutoDispatcher):
        dispatcher = replace(
            dispatcher, row_flops=dispatcher.row_flops or row_flops, wire=dispatcher.wire if wire is None else wire
        )
        if isinstance(overlap, int):
            return replace(dispatcher, degrees=(overlap,))
        return dispatcher if overlap is None else OverlapDispatcher(replace(dispatcher, degrees=(1,)), overlap)
    if wire is not None:
        dispatcher = CompressedDispatcher(dispatcher, wire)  # pyright: ignore[reportArgumentType]  # it raises TypeError
    return dispatcher if overlap is None else OverlapDispatcher(dispatcher, overlap)


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """The `MoE` layers of a model by name; a model that is one has the name ""."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MoE)}


def _number(layers: dict[str, MoE], group: ProcessGroup | None) -> None:
    """Give every layer its place, by which ranks notice that they are in different ones."""
    drawn = [secrets.randbits(30)]  # not from a generator of the user's
    if group is not None:
        dist.broadcast_object_list(drawn, group=group, group_src=0)
    sizes = {layer.num_experts for layer in layers.values()}
    for number, layer in enumerate(layers.values()):
        layer.place = Place(drawn[0], number, tuple(layers), layer.training, max(sizes) if len(sizes) > 1 else 0)


def _check_untied(layers: dict[str, MoE]) -> None:
    """FSDP2 keeps parameters by module: one that two modules have would become two."""
    owner: dict[int, tuple[str, Experts]] = {}
    for name, layer in layers.items():
        for p in layer.experts.parameters():
            first, experts = owner.setdefault(id(p), (name, layer.experts))
            if experts is not layer.experts:
                raise ValueError(
                    f"{called(first)} and {called(name)} share parameters of experts, and FSDP2 would part them: let "
                    "both have the same Experts module, or leave fully_shard_experts out"
                )


def _fsdp_axis(p: nn.Parameter, ranks: int) -> Shard | None:
    """Where FSDP may split a stacked parameter, None if nowhere: on an axis that no other mesh axis splits, if it can.

    Beyond axis 0 FSDP2 splits evenly or not at all (torch 2.13).
    """
    taken = {placed.dim for placed in p.placements if isinstance(placed, Shard)} if isinstance(p, DTensor) else {0}
    free = [axis for axis in range(p.ndim) if axis not in taken]
    held = local(p).shape
    return next((Shard(axis) for axis in (*free, *sorted(taken, reverse=True)) if held[axis] % ranks == 0), None)
