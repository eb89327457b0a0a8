"""`parallelize` spreads the experts of a model over a mesh."""

from __future__ import annotations

import secrets
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ...dispatch import mesh as axes
from ...dispatch.autoselect.auto import AutoDispatcher
from ...dispatch.autoselect.profile import Profile
from ...dispatch.bounded import BoundedDispatcher
from ...dispatch.dispatcher import Dispatcher
from ...dispatch.local import LocalDispatcher
from ...dispatch.mesh import Meshes
from ...dispatch.place import Place
from ...dispatch.timeout import seconds
from ...dispatch.wire import Wire
from ..layer import MoE, moe_layers
from ..names import called
from .alike import agree
from .named_dispatchers import BY_NODE, check_options, equipped, named_dispatcher
from .sharding import shares, spread
from .unstepped import WarnUnstepped
from .weight_travel import WeightTravel

Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: Model,
    mesh: DeviceMesh | Meshes,
    dispatcher: str | Dispatcher = "auto",
    profile: str | Path | Profile | None = None,
    overlap: int | Literal["auto"] | None = None,
    wire: Wire | None = None,
    timeout: timedelta | float | None = None,
    parallelism: int | Literal["auto"] | None = None,
    max_rows: int | None = None,
) -> Model:
    """Spread the experts of every `MoE` in a model over ranks, in place (expert parallelism). Call it on every rank.

    Rank r of W keeps experts [r*E/W, (r+1)*E/W), as DTensors sharded on axis 0. Expert parameters are new objects, so
    make the optimizer afterwards. Experts and parameters that layers share stay shared. After backward, an expert's
    gradient is the sum over the ranks that sent it tokens, and `sync_gradients` divides it. An error leaves the model
    unchanged, on every rank.

    Args:
        model: model that is the same on every rank: built under the same `torch.manual_seed`, or with the same weights
            loaded. On the meta device, the `seed` of experts must be the same. A model without `MoE` layers is warned
            about.
        mesh: mesh whose axes have names, or `Meshes`. Experts are spread over ``"ep"`` (or ``"node"`` and ``"local"``),
            replicated over ``"edp"``, and their hidden width is split over ``"etp"`` (`TensorParallelDispatcher`). Each
            rank has its own part of the batch. Without an "ep" axis all ranks keep all experts. `Meshes` add tp and
            cp, whose ranks hold parts of the same sequences (`tensor_parallel`, `context_parallel`).
        dispatcher: transport by name, or a `Dispatcher`. ``"flat"`` is one all-to-all. A mesh with "node" and "local"
            also has ``"2dh"`` (`HierarchicalDispatcher`) and ``"node"`` (`NodeDispatcher`). ``"auto"``, the default,
            takes the fastest of the three there, in 1, 2 or 4 chunks, by measured costs (`AutoDispatcher`; one chunk
            with "etp"). On other meshes "auto" is "flat".
        profile: costs for "auto", or the file that ``python -m turnout.dispatch.autoselect.probe`` saved them in. None,
            the default, measures them now, which takes about a second.
        overlap: number of chunks of a batch: one chunk travels while another is computed (`OverlapDispatcher`).
            ``"auto"`` tries 1, 2 and 4 in the first training steps. None, the default, is one chunk, or the number that
            ``dispatcher="auto"`` chooses.
        wire: format in which rows travel, ``"bf16"`` or ``"fp8"`` (`CompressedDispatcher`). None, the default, sends
            them as they are. If one rank has all experts, nothing travels, and a named dispatcher ignores `wire` and
            `overlap`.
        timeout: longest time that a collective of the mesh's groups waits for a rank, positive, in seconds or as a
            timedelta. None, the default, keeps the timeout of `Meshes.of` or `init_process_group`. torch's default for
            groups of a mesh is 30 minutes.
        parallelism: r of every layer at first (`WeightTravel`, `MoE.parallelism`). 0 brings experts to their tokens. On
            a mesh with "etp" = s > 1, r may be any divisor of s. Each token then visits r ranks of an expert, and s / r
            ranks share one slice. None, the default, is s, or 1 without "etp". No weights travel then. ``"auto"``
            starts like that, and lets `Adaptive` choose r, shadowed experts, and the chunks of an "auto" dispatcher. If
            it never steps, a warning says so.
        max_rows: the most rows that a rank holds at once in a layer. A step above it runs in rounds, with the same
            results (`BoundedDispatcher`). None, the default, sets no budget.

    Returns:
        The model.

    Raises:
        ValueError: an axis is missing or unknown. Experts do not split, or share a parameter with other parts. Layers
            differ between ranks, in options, weights or buffers of a gate. `profile`, `overlap`, `wire` or `timeout`
            does not fit. Every tp rank would send all tokens. The model has experts but no MoE layer. All ranks raise.
        TypeError: `wire` is given for a `Dispatcher` that is not a `SteppedDispatcher`.
    """
    check_options(dispatcher, overlap, wire)
    seconds(timeout)  # raises on what is not a time
    everyone, batch, sequence = axes.token_group(mesh), axes.data_group(mesh), axes.sequence_group(mesh)
    if isinstance(mesh, Meshes):
        _check_dense_axes(model, mesh)
    expert_mesh = axes.of_experts(mesh)
    if isinstance(dispatcher, str) and dispatcher in BY_NODE:
        axes.node_and_local(expert_mesh)  # raises on a mesh without these axes, even if there is nothing to spread
    ep = axes.axis(expert_mesh, axes.EP)
    axes.set_timeout(mesh, timeout)
    if isinstance(dispatcher, str):
        chunks = parallelism == "auto" and overlap is None
        dispatcher = named_dispatcher(dispatcher, expert_mesh, ep, profile, chunks)
        if isinstance(dispatcher, LocalDispatcher):
            overlap = wire = None

    def work_of(layer: MoE) -> float:
        return layer.experts.row_flops if isinstance(dispatcher, AutoDispatcher) else 0.0

    layers, holders = moe_layers(model), None if ep is None else axes.holders(expert_mesh)
    _check_layers(model, layers, pipeline=axes.staged(mesh))
    # plan everything, and change nothing before all ranks agree
    planned, fault, weights = [], None, WeightTravel(None, None, 1)
    dispatchers: dict[float, Dispatcher] = {}  # layers whose experts cost the same share an `AutoDispatcher`
    try:
        if holders is not None:
            planned = shares(model, layers, holders)
            weights = WeightTravel.of(expert_mesh)
            dispatchers = {work: equipped(dispatcher, work, overlap, wire) for work in map(work_of, layers.values())}
        if max_rows is not None:
            bounded = dispatchers or dict.fromkeys(map(work_of, layers.values()), LocalDispatcher())
            dispatchers = {work: BoundedDispatcher(each, max_rows) for work, each in bounded.items()}
        for name, layer in layers.items():
            shadow = "auto" if parallelism == "auto" else None
            weights = weights.choose(layer.num_experts, called(name), parallelism, shadow)
    except (ValueError, TypeError) as error:
        fault = error
    options = {"overlap": repr(overlap), "wire": repr(wire), "the dispatcher": type(dispatcher).__name__}
    options |= {"parallelism": repr(parallelism), "max_rows": repr(max_rows)}
    agree(layers, options, fault, everyone, "before parallelize, which every rank calls with the same arguments")

    for share in planned:
        spread(share)
    _number(layers, everyone)
    for layer in layers.values():
        layer.balance_group, layer.sequence_group = batch, sequence
        if dispatchers:
            layer.dispatcher = dispatchers[work_of(layer)]
        layer.weights = weights
        layer.parallelism = "auto" if parallelism == "auto" else weights.parallelism
    if layers and parallelism == "auto" and not weights.alone:
        next(iter(layers.values())).register_forward_hook(WarnUnstepped())
    return model


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of `MoE` experts in a model, by name. DDP must be told to ignore them.

    >>> layer = MoE(dim=4, hidden=8, num_experts=2, experts="gelu")
    >>> list(expert_parameters(nn.Sequential(layer, nn.Linear(4, 4))))
    ['0.experts.w_up', '0.experts.w_down']
    """
    return {
        f"{name}.experts.{own}" if name else f"experts.{own}": p
        for name, layer in moe_layers(model).items()
        for own, p in layer.experts.named_parameters()
    }


def _check_dense_axes(model: nn.Module, meshes: Meshes) -> None:
    """Raise ValueError if tp or cp ranks hold the same tokens: `parallelize` comes after what splits them."""
    if meshes.dense[axes.TP].size() > 1 and not any(map(_is_split, model.parameters())):
        raise ValueError(
            'tp > 1, but nothing is split over "tp": every tp rank would send all tokens; call '
            'tensor_parallel(model, meshes.dense["tp"]) first'
        )
    if meshes.dense[axes.CP].size() > 1 and not any(getattr(m, "splits_sequences", False) for m in model.modules()):
        raise ValueError(
            "cp > 1, but sequences are not split: every cp rank would send all tokens; call "
            "context_parallel(model, meshes) first"
        )


def _is_split(p: Tensor) -> bool:
    return isinstance(p, DTensor) and axes.TP in axes.names(p.device_mesh)


def _check_layers(model: nn.Module, layers: dict[str, MoE], pipeline: bool) -> None:
    """Raise ValueError for a model with experts that are not in `MoE` layers, and warn of one without experts."""
    if layers:
        return
    others = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "experts"]
    if others:
        raise ValueError(
            f"{type(model).__name__} has no MoE layer, but {len(others)} modules called experts, such as {others[0]}, "
            "which stay as they are: for a model of Hugging Face call turnout.models.hf.replace_moe(model) first"
        )
    if not pipeline:  # a stage of a pipeline may have none
        warnings.warn(
            f"{type(model).__name__} has no MoE layer: parallelize changes nothing; call it on the model that has some",
            stacklevel=3,
        )


def _number(layers: dict[str, MoE], group: ProcessGroup | None) -> None:
    """Give every layer its `Place`, so that ranks notice when they run different layers."""
    drawn = [secrets.randbits(30)]  # leaves the user's random generators alone
    if group is not None:
        dist.broadcast_object_list(drawn, group=group, group_src=0)
    sizes = {layer.num_experts for layer in layers.values()}
    for number, layer in enumerate(layers.values()):
        layer.place = Place(drawn[0], number, tuple(layers), layer.training, max(sizes) if len(sizes) > 1 else 0)
