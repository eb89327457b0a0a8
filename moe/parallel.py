"""Placement: the experts of a model over the ranks of a mesh."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ..dispatch import mesh as axes
from ..dispatch.auto import AutoDispatcher
from ..dispatch.base import Dispatcher, NodeLocalDispatcher, SteppedDispatcher
from ..dispatch.compressed import CompressedDispatcher
from ..dispatch.flat import FlatDispatcher
from ..dispatch.hierarchical import HierarchicalDispatcher
from ..dispatch.local import LocalDispatcher
from ..dispatch.mesh import Meshes
from ..dispatch.node import NodeDispatcher
from ..dispatch.overlap import OverlapDispatcher
from ..dispatch.place import Place
from ..dispatch.profile import Profile
from ..dispatch.tensor_parallel import TensorParallelDispatcher
from ..dispatch.wire import WIRES, Wire
from .experts import Experts
from .layer import MoE
from .stacked import local

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
) -> Model:
    """Spread the experts of every `MoE` in a model over ranks, in place; call it on every rank.

    Rank r of the axis keeps experts [r*L, (r+1)*L) as DTensors sharded on axis 0. Nothing is scaled:
    after backward, expert gradients are sums over the ranks that sent tokens (`sync_gradients`). Parameters of
    the experts are new objects: make the optimizer afterwards.

    Args:
        model: built alike on every rank, under one `torch.manual_seed`; on the meta device, too.
        mesh: one mesh whose axes are told by name: ``"ep"`` (or ``"node"`` and ``"local"``), over which
            experts are spread, ``"edp"``, over which they are repeated, and ``"etp"``, over which the hidden
            width of each is split (`TensorParallelDispatcher`); each rank of it has a part of the batch.
            Without an "ep" axis all experts stay where they are. Or `Meshes`: with tp, each rank has a part of
            every sequence of its part of the batch, which `tensor_parallel` sees to.
        dispatcher: ``"flat"``, ``"auto"``, or a `Dispatcher`. On a mesh with "node" and "local" also ``"2dh"``
            (`HierarchicalDispatcher`) and ``"node"`` (`NodeDispatcher`). There "auto" takes the fastest of these, in 1,
            2 or 4 chunks, by measured costs (`AutoDispatcher`; with "etp" in one); elsewhere it is flat, in one piece.
        profile: those costs, or the file ``python -m turnout.dispatch.probe`` saved them in; None measures now,
            which takes about a second. Used by "auto" alone.
        overlap: chunks of a batch, which travel while others are computed (`OverlapDispatcher`); ``"auto"`` tries 1,
            2 and 4 in the first training steps. None: one, or as many as ``dispatcher="auto"`` has chosen.
        wire: ``"bf16"`` or ``"fp8"``: rows travel in fewer bytes (`CompressedDispatcher`). None: as they are. Where one
            rank has all experts nothing travels, and neither this nor `overlap` has an effect on a named dispatcher.

    Raises:
        ValueError: axes missing or unknown, experts that do not split, models that differ between ranks, a profile that
            does not fit, an overlap or a wire that is none or that the given `Dispatcher` has already, tokens
            that tp ranks would repeat.
        TypeError: a wire for a `Dispatcher` whose rows cannot be reached (no `SteppedDispatcher`).
    """
    _check_options(dispatcher, overlap, wire)
    everyone, batch, sequence = axes.token_group(mesh), axes.data_group(mesh), axes.sequence_group(mesh)
    if sequence is not None and not any(_split(p, axes.TP) for p in model.parameters()):
        raise ValueError(
            'tp > 1, but nothing is split over "tp": every tp rank would send all tokens; call '
            'tensor_parallel(model, meshes.dense["tp"]) first'
        )
    mesh = axes.of_experts(mesh)
    if isinstance(dispatcher, str) and dispatcher in BY_NODE:
        axes.node_and_local(mesh)  # raises on a mesh without them, also where nothing is to be spread
    ep = axes.axis(mesh, axes.EP)
    if isinstance(dispatcher, str):
        dispatcher = _named(dispatcher, mesh, ep, profile)
        if isinstance(dispatcher, LocalDispatcher):
            overlap = wire = None
    _check_alike(model, everyone, overlap, wire)
    dispatchers: dict[float, Dispatcher] = {}  # what chooses by costs is shared by layers whose experts cost the same
    for name, layer in _moe_layers(model):
        layer.balance_group, layer.sequence_group = batch, sequence
        if ep is None:
            continue
        if any(isinstance(p, DTensor) for p in layer.experts.parameters()):
            raise ValueError(f"the experts of {name} are spread already: call parallelize once, before any FSDP")
        if layer.num_experts % ep.size():
            raise ValueError(
                f"num_experts={layer.num_experts} of {name} does not split over ep={ep.size()} ranks; use a "
                f"multiple of {ep.size()}, or a mesh whose ep axis divides {layer.num_experts}"
            )
        work = layer.experts.row_flops if isinstance(dispatcher, AutoDispatcher) else 0.0
        if work not in dispatchers:
            dispatchers[work] = _equipped(dispatcher, work, overlap, wire)
        _spread(layer.experts, axes.holders(mesh))
        layer.dispatcher = dispatchers[work]
    _number(model, everyone)
    return model


def fully_shard_experts(model: Model, mesh: DeviceMesh | Meshes, **options: Any) -> Model:
    """FSDP2 for the experts of a parallelized model, over the axis "edp", with the right divisor.

    Then wrap the rest: ``fully_shard(model, mesh=...)`` over all ranks of the mesh. FSDP averages
    over the ranks that hold an expert, while the loss is averaged over all ranks that have a part of the
    batch: the divisor says so. `options` go to `torch.distributed.fsdp.fully_shard`.
    """
    averaged, mesh = axes.data_mesh(mesh).size(), axes.of_experts(mesh)
    edp = axes.axis(mesh, axes.EDP)
    if edp is None or axes.axis(mesh, axes.EP) is None:
        raise ValueError(f"fully_shard_experts needs the axes edp (1 will do) and ep; the mesh has {axes.names(mesh)}")
    policy = options.get("mp_policy", MixedPrecisionPolicy())
    options.setdefault("shard_placement_fn", _free_axis)
    for _, layer in _moe_layers(model):
        reduced = policy.reduce_dtype or policy.param_dtype or next(layer.experts.parameters()).dtype
        if edp.size() == 1 and reduced not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"with edp=1, FSDP2 divides {reduced} gradients twice (torch 2.13); pass "
                "mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32)"
            )
        experts = cast(FSDPModule, fully_shard(layer.experts, mesh=edp, **options))
        experts.set_gradient_divide_factor(float(averaged))
        # gloo has no scaled sum; with one rank to reduce over, forcing plain sums divides twice (torch 2.13)
        experts.set_force_sum_reduction_for_comms(edp.size() > 1)
    return model


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model, by name, that belong to `MoE` experts: what DDP must be told to ignore."""
    return {
        f"{name}.experts.{own}" if name else f"experts.{own}": p
        for name, layer in _moe_layers(model)
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


def _moe_layers(model: nn.Module) -> Iterator[tuple[str, MoE]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, MoE))


def _number(model: nn.Module, group: ProcessGroup | None) -> None:
    """Give every layer its place, by which ranks notice that they are in different ones."""
    drawn = [secrets.randbits(30)]  # not from a generator of the user's
    if group is not None:
        dist.broadcast_object_list(drawn, group=group, group_src=0)
    layers = dict(_moe_layers(model))
    sizes = {layer.num_experts for layer in layers.values()}
    for number, layer in enumerate(layers.values()):
        layer.place = Place(drawn[0], number, tuple(layers), layer.training, max(sizes) if len(sizes) > 1 else 0)


def _check_alike(model: nn.Module, group: ProcessGroup | None, overlap: Any, wire: Any) -> None:
    """The layers must be the same on all ranks, seeds too: replicas of an expert start equal. And the options."""
    if group is None:
        return
    mine = [f"overlap={overlap!r}, wire={wire!r}"]
    mine += [f"layer {name}: {what}" for name, layer in _moe_layers(model) for what in _description(layer)]
    everyones: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, mine, group=group)
    for rank, theirs in enumerate(everyones):
        if theirs != everyones[0]:
            what = next(
                (f"{a} against {b}" for a, b in zip(theirs, everyones[0], strict=False) if a != b), "their number"
            )
            raise ValueError(
                f"rank {rank} has built other MoE layers than rank 0: {what}; build the model with the same arguments "
                "and under the same torch.manual_seed on every rank, load the same weights on all of them, and call "
                "parallelize with the same arguments, too"
            )


def _description(layer: MoE) -> Iterator[str]:
    """What must be the same on all ranks, the values of the router told by the sum of their bytes."""
    capacity = ("capacity_factor", "eval_capacity_factor", "min_capacity", "drop_policy", "pad")
    losses = ("balance", "balance_choices", "aux_loss_weight", "z_loss_weight")
    for name in ("num_experts", *capacity, *losses, "weight_on"):
        yield f"{name}={getattr(layer, name)!r}"
    yield f"experts of seed {layer.experts.seed}"
    yield f"gate {type(layer.gate).__name__}, top_k={getattr(layer.gate, 'top_k', None)}"
    for name, p in layer.named_parameters():
        yield f"{name} {tuple(p.shape)} {p.dtype}"
    for name, p in layer.gate.named_parameters():
        if not p.is_meta and not (isinstance(p, DTensor) and any(isinstance(placed, Shard) for placed in p.placements)):
            yield f"the bytes of gate.{name} add up to {_bytes(p)}"


def _bytes(tensor: Tensor) -> int:
    """A sum that is the same in any order."""
    return int(local(tensor.detach()).flatten().view(torch.uint8).sum(dtype=torch.int64))


def _free_axis(p: nn.Parameter) -> Shard:
    """Where FSDP may split a stacked parameter: experts lie on axis 0, etp's slices on another."""
    taken = {placed.dim for placed in p.placements if isinstance(placed, Shard)} if isinstance(p, DTensor) else {0}
    return Shard(next((axis for axis in range(p.ndim) if axis not in taken), p.ndim - 1))


@torch.no_grad()
def _spread(experts: Experts, mesh: DeviceMesh) -> None:
    """Keep this rank's part of every stacked tensor, as a DTensor: its experts, and of these its slice (axis etp)."""
    sliced = experts.split_axes() if axes.ETP in axes.names(mesh) else {}
    places = dict(zip(axes.names(mesh), mesh.get_coordinate() or (), strict=True))

    def shard(tensor: Tensor, what: str) -> DTensor:
        held, placements = tensor.detach(), []
        for name, place in places.items():
            axis = sliced[what] if name == axes.ETP else 0
            if held.shape[axis] % mesh[name].size():
                raise ValueError(
                    f"{what} {tuple(tensor.shape)} does not split over {name}={mesh[name].size()} on axis {axis}"
                )
            held = held.chunk(mesh[name].size(), axis)[place]
            placements.append(Shard(axis))
        held = held.clone(memory_format=torch.contiguous_format)  # a view would keep them all; FSDP2 asks for no gaps
        return DTensor.from_local(held, mesh, placements, run_check=False)

    for prefix, module in experts.named_modules():
        for own, p in list(module.named_parameters(recurse=False)):
            spread = shard(p, f"{prefix}.{own}" if prefix else own)
            setattr(module, own, nn.Parameter(spread, requires_grad=p.requires_grad))
        for own, b in list(module.named_buffers(recurse=False)):
            setattr(module, own, shard(b, f"{prefix}.{own}" if prefix else own))
