"""Gradients after backward: synchronise them over ranks, and clip them.

The type and mesh of a parameter tell which ranks share it. Expert parameters are DTensors on the axis "ep", and
tensor-parallel ones are DTensors on "tp". Others are plain tensors, or DTensors of the wrapper (FSDP2) that reduces
them.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ...dispatch import mesh as axes
from ...dispatch.failure import named
from ...dispatch.mesh import Meshes
from ..experts.sharded import local
from ..layer import MoE, moe_layers
from ..names import called

ABSENT, DENSE, SPARSE = range(3)


def sync_gradients(model: nn.Module, mesh: DeviceMesh | Meshes, dense: bool = True) -> None:
    """Sum and divide gradients over ranks, so that they belong to the mean loss of all ranks.

    Call it once a step, after the backward of the last micro-batch. Each call divides all gradients again.

    Expert gradients are summed over "edp", because backward has already summed them over "ep". Gradients of matrices
    split over "tp" are summed over "dp" and "cp", and all others over all ranks that have their own tokens. All are
    divided by the number of ranks that have parts of the batch. A gradient that is None on some ranks counts as zeros
    there, and stays None if it is None on all. Parameters that a wrapper reduces (FSDP2) are left alone.

    Args:
        model: model that `parallelize` got.
        mesh: mesh that `parallelize` got.
        dense: whether parameters outside the experts are reduced; True by default. Pass False if DDP reduces them.

    Raises:
        ValueError: the model was not parallelized, or over a mesh of other ranks, or it has sparse gradients on a GPU.
    """
    layers = moe_layers(model)
    data, edp = axes.data_mesh(mesh), axes.axis(axes.of_experts(mesh), axes.EDP)
    _check_parallelized(layers, data.mesh.flatten().tolist())
    own = {id(p) for layer in layers.values() for p in layer.experts.parameters()}
    experts, split, others = [], [], []
    for p in model.parameters():
        if not p.requires_grad:
            continue
        held_by = axes.names(p.device_mesh) if isinstance(p, DTensor) else None
        if held_by is not None and {axes.EP, axes.NODE} & set(held_by) and axes.EDP not in held_by:
            experts.append(p)
        elif dense and held_by == (axes.TP,) and not _is_whole(p):
            split.append(p)
        elif (dense or id(p) in own) and held_by in (None, (axes.TP,)):  # experts, too, on a mesh without "ep"
            others.append(p)
    kinds = _kinds([*experts, *split, *others], axes.token_group(mesh))
    _reduce(experts, kinds, None if edp is None or edp.size() == 1 else edp.get_group(), data.size())
    _reduce(split, kinds, axes.replica_group(mesh), data.size())
    _reduce(others, kinds, axes.token_group(mesh), data.size())


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module, max_norm: float, stages: ProcessGroup | None = None, counted: Collection[nn.Parameter] = ()
) -> Tensor:
    """Clip gradients in place, so that the 2-norm of all of them together is at most `max_norm`. All ranks call it.

    The norm is exact for any mix of plain and DTensor parameters, because each distinct shard counts once. Absent
    gradients count as zeros.

    Args:
        model: model, or in a pipeline an `nn.ModuleList` of this rank's stages.
        max_norm: largest norm of the gradients of the whole model.
        stages: ranks of a pipeline, which hold different stages. None, the default, is a model without a pipeline.
        counted: parameters that are copies of others. They are scaled, but do not count in the norm. None by default.

    Returns:
        The norm before clipping, a scalar.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
    >>> clip_grad_norm_(model, max_norm=1.0), model.weight.grad.norm().round(decimals=4)
    (tensor(5.), tensor(1.))
    """
    copies = {id(p) for p in counted}
    parameters = [p for p in model.parameters() if p.requires_grad]
    squares: dict[tuple[ProcessGroup, ...], list[Tensor]] = {}
    for p in parameters:
        square = _zero(p) if p.grad is None or id(p) in copies else _squared(p.grad, _zero(p).dtype)
        squares.setdefault(_split_over(p), []).append(square)
    total = torch.zeros((), device=parameters[0].device if parameters else None)
    for groups, parts in squares.items():
        square = torch.stack([part.to(total.device) for part in parts]).sum()
        for group in groups:
            with named("the gradient's norm (clip_grad_norm_)", group):
                dist.all_reduce(square, group=group)
        total = total + square
    if stages is not None:
        total = total.double()  # stages may have different dtypes
        with named("the gradient's norm (clip_grad_norm_)", stages):
            dist.all_reduce(total, group=stages)
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for p in parameters:
        if p.grad is not None:
            local(p.grad).mul_(scale.to(p.grad.device))
    return norm


def _check_parallelized(layers: dict[str, MoE], ranks: list[int]) -> None:
    groups: dict[ProcessGroup | None, str] = {}  # each group with its first layer; most models have one group
    for name, layer in layers.items():
        groups.setdefault(layer.balance_group, called(name))
    for group, name in groups.items():
        if group is None and len(ranks) > 1:
            raise ValueError(f"{name} is on one rank: call parallelize(model, mesh) on all ranks first")
        if group is not None and sorted(ranks) != sorted(theirs := dist.get_process_group_ranks(group)):
            raise ValueError(
                f"the mesh averages over ranks {ranks}, but {name} was parallelized over ranks {theirs}: pass the same "
                "mesh to both"
            )


def _squared(grad: Tensor, dtype: torch.dtype) -> Tensor:
    held = grad.coalesce().values() if grad.is_sparse else local(grad)
    return held.norm(dtype=dtype).square()


def _is_whole(tensor: Tensor) -> bool:
    return not isinstance(tensor, DTensor) or all(placed.is_replicate() for placed in tensor.placements)


def _zero(p: Tensor) -> Tensor:
    return torch.zeros((), device=p.device, dtype=torch.promote_types(p.dtype, torch.float32))


def _split_over(p: Tensor) -> tuple[ProcessGroup, ...]:
    """The process groups whose ranks hold different parts of p."""
    if not isinstance(p, DTensor):
        return ()
    mesh = p.device_mesh
    return tuple(mesh.get_group(dim) for dim, placed in enumerate(p.placements) if not placed.is_replicate())


def _kinds(parameters: list[nn.Parameter], group: ProcessGroup | None) -> dict[nn.Parameter, int]:
    """Kind of each parameter's gradient over all ranks: ABSENT on all of them, SPARSE on at least one, or DENSE."""
    mine = [ABSENT if p.grad is None else SPARSE if p.grad.is_sparse else DENSE for p in parameters]
    if group is None or not mine:
        return dict(zip(parameters, mine, strict=True))
    kinds = torch.tensor(mine, dtype=torch.uint8).to(parameters[0].device)
    with named("gradients (sync_gradients)", group):
        dist.all_reduce(kinds, dist.ReduceOp.MAX, group=group)
    return dict(zip(parameters, kinds.tolist(), strict=True))


@torch.no_grad()
def _reduce(
    parameters: list[nn.Parameter], kinds: dict[nn.Parameter, int], group: ProcessGroup | None, divisor: int
) -> None:
    """Sum gradients over a group and divide them. A gradient that no rank has stays None."""
    grads = []
    for p in parameters:
        if kinds[p] == SPARSE:
            p.grad = _mean_of_sparse(p, group, divisor)
        elif kinds[p] == DENSE:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if isinstance(p, DTensor) and _is_whole(p):
                p.grad = _summed_part(p, p.grad)
            elif isinstance(p, DTensor) and isinstance(p.grad, DTensor) and p.grad.placements != p.placements:
                p.grad = p.grad.redistribute(placements=p.placements)  # DTensor chooses others on ranks without tokens
            grads.append(local(p.grad))
    for g in grads:
        if group is None or g.dtype == torch.float16:  # divide first: a float16 sum could exceed 65504
            g.div_(divisor)
    for bucket in _buckets(grads) if group is not None else []:
        flat = torch.cat([g.flatten() for g in bucket])
        with named("gradients (sync_gradients)", group):
            dist.all_reduce(flat, group=group)
        if flat.dtype != torch.float16:
            flat.div_(divisor)
        for g, reduced in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            g.copy_(reduced.view_as(g))


def _mean_of_sparse(p: nn.Parameter, group: ProcessGroup | None, divisor: int) -> Tensor:
    """The summed and divided gradient of an ``nn.Embedding(sparse=True)``: sparse, with the rows of all ranks."""
    if group is not None and p.device.type != "cpu":
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} has sparse gradients, which {dist.get_backend(group)} cannot sum: "
            "build its nn.Embedding with sparse=False"
        )
    grad = p.grad
    if grad is None:
        index, rows = torch.empty(1, 0, dtype=torch.int64, device=p.device), p.new_empty(0, *p.shape[1:])
        grad = torch.sparse_coo_tensor(index, rows, p.shape, check_invariants=False)
    elif not grad.is_sparse:  # this rank also used the matrix outside the embedding
        grad = grad.to_sparse(1)
    early = grad.dtype == torch.float16
    grad = grad / divisor if early else grad
    if group is not None:
        with named("sparse gradients (sync_gradients)", group):
            dist.all_reduce(grad, group=group)
    return grad.coalesce() if early else grad.coalesce() / divisor


def _summed_part(p: DTensor, grad: Tensor) -> Tensor:
    """This rank's summand for the gradient of a parameter that each rank holds as a whole.

    DTensor may have summed the gradient already, or may have left this rank's summand (`Partial`). A gradient that is
    summed already is divided among the ranks, so that one reduction serves both cases.
    """
    assert isinstance(grad, DTensor)
    part = local(grad)
    if _is_whole(grad):
        part = part / grad.device_mesh.size()
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False)


def _buckets(grads: list[Tensor], limit: int = 1 << 25) -> list[list[Tensor]]:
    """Lists of gradients of one dtype and device, each with at most `limit` bytes or a single larger tensor."""
    buckets: list[list[Tensor]] = []
    room: dict[tuple[torch.dtype, torch.device], int] = {}
    place: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for g in grads:
        kind = g.dtype, g.device
        if room.get(kind, 0) < g.nbytes:
            buckets.append([])
            place[kind], room[kind] = buckets[-1], limit
        place[kind].append(g)
        room[kind] -= g.nbytes
    return buckets
