"""After backward: gradients synchronised, clipped, and handed to an optimizer.

A parameter says by its own type and mesh with whom it is shared: an expert's is a DTensor on the axis
"ep", one of a tensor-parallel part a DTensor on "tp", another a plain tensor, or a DTensor of the wrapper (FSDP2)
that reduces it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ...dispatch import mesh as axes
from ...dispatch.failure import named
from ...dispatch.mesh import Meshes
from ..build import called
from ..layer import MoE

ABSENT, DENSE, SPARSE = range(3)


def sync_gradients(model: nn.Module, mesh: DeviceMesh | Meshes, dense: bool = True) -> None:
    """After backward, without FSDP: make gradients those of the mean over ranks of every rank's loss.

    Expert gradients are summed over "edp" (over "ep" they were summed on the way back), those of matrices split over
    "tp" over "dp", others over all ranks that have tokens of their own; all are divided by the number of ranks
    that have parts of the batch. A gradient that some ranks lack counts as zeros there; one that all lack stays None.
    What a wrapper reduces by itself (FSDP2's DTensors) is left alone.

    Call it once a step, after the last micro-batch's backward: each call divides whatever has been gathered until then.

    Args:
        model, mesh: as given to `parallelize`.
        dense: False where something else reduces the gradients of all but experts, such as DDP.

    Raises:
        ValueError: a model that has not been parallelized, or on a mesh of other ranks; sparse gradients on a GPU.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MoE)}
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
    _reduce(split, kinds, axes.data_group(mesh), data.size())
    _reduce(others, kinds, axes.token_group(mesh), data.size())


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module, max_norm: float, stages: ProcessGroup | None = None, counted: Collection[nn.Parameter] = ()
) -> Tensor:
    """Scale all gradients so that their joint 2-norm is at most `max_norm`; returns the norm before, a scalar.

    Exact for any mix of plain and DTensor parameters: every distinct shard counts once. Absent gradients
    count as zeros. All ranks must call it.

    Args:
        model: the model, or in a pipeline this rank's stages of it in a `ModuleList`.
        max_norm: of the gradients of the whole model.
        stages: the ranks of a pipeline, that hold different stages; None: the model is not cut.
        counted: parameters that are scaled, but are copies of others and do not count again.
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
        total = total.double()  # a stage may be of another dtype than the next
        with named("the gradient's norm (clip_grad_norm_)", stages):
            dist.all_reduce(total, group=stages)
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for p in parameters:
        if p.grad is not None:
            _held(p.grad).mul_(scale.to(p.grad.device))
    return norm


def param_groups(params: nn.Module | Iterable[nn.Parameter], **options: Any) -> list[dict[str, Any]]:
    """Optimizer groups that do not mix plain and DTensor parameters: foreach and fused steps refuse both at once.

    `options` (lr, weight_decay, ...) go into each group: ``AdamW(param_groups(model), fused=True)``.
    """
    params = list(params.parameters() if isinstance(params, nn.Module) else params)
    kinds = [p for p in params if isinstance(p, DTensor)], [p for p in params if not isinstance(p, DTensor)]
    return [{"params": kind, **options} for kind in kinds if kind]


def _check_parallelized(layers: dict[str, MoE], ranks: list[int]) -> None:
    groups: dict[ProcessGroup | None, str] = {}  # with the first layer of each: mostly one for all
    for name, layer in layers.items():
        groups.setdefault(layer.balance_group, called(name))
    for group, name in groups.items():
        if group is None and len(ranks) > 1:
            raise ValueError(f"{name} is on one rank: call parallelize(model, mesh) on all, before this")
        if group is not None and sorted(ranks) != sorted(theirs := dist.get_process_group_ranks(group)):
            raise ValueError(
                f"the mesh averages over ranks {ranks}, and {name} was parallelized over {theirs}: pass both the same "
                "mesh"
            )


def _held(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _squared(grad: Tensor, dtype: torch.dtype) -> Tensor:
    held = grad.coalesce().values() if grad.is_sparse else _held(grad)
    return held.norm(dtype=dtype).square()


def _is_whole(tensor: Tensor) -> bool:
    return not isinstance(tensor, DTensor) or all(placed.is_replicate() for placed in tensor.placements)


def _zero(p: Tensor) -> Tensor:
    return torch.zeros((), device=p.device, dtype=torch.promote_types(p.dtype, torch.float32))


def _split_over(p: Tensor) -> tuple[ProcessGroup, ...]:
    """The groups whose ranks hold different parts of p."""
    if not isinstance(p, DTensor):
        return ()
    mesh = p.device_mesh
    return tuple(mesh.get_group(dim) for dim, placed in enumerate(p.placements) if not placed.is_replicate())


def _kinds(parameters: list[nn.Parameter], group: ProcessGroup | None) -> dict[nn.Parameter, int]:
    """Of each parameter's gradient on all ranks together: ABSENT on each, DENSE, or SPARSE on one at least."""
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
    """Sum gradients over a group and divide them; those that no rank has stay None."""
    grads = []
    for p in parameters:
        if kinds[p] == SPARSE:
            p.grad = _mean_of_sparse(p, group, divisor)
        elif kinds[p] == DENSE:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if isinstance(p, DTensor) and _is_whole(p):
                p.grad = _summed_part(p, p.grad)
            elif isinstance(p, DTensor) and isinstance(p.grad, DTensor) and p.grad.placements != p.placements:
                p.grad = p.grad.redistribute(placements=p.placements)  # DTensor's choice, where a rank has no tokens
            grads.append(_held(p.grad))
    for g in grads:
        if group is None or g.dtype == torch.float16:  # its sum could overflow, at 65504
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
    """The gradient of an ``nn.Embedding(sparse=True)``, summed and divided: sparse, with the rows of all ranks."""
    if group is not None and p.device.type != "cpu":
        raise ValueError(
            f"a parameter {tuple(p.shape)} has sparse gradients, which {dist.get_backend(group)} cannot sum: build its "
            "nn.Embedding with sparse=False"
        )
    grad = p.grad
    if grad is None:
        index, rows = torch.empty(1, 0, dtype=torch.int64, device=p.device), p.new_empty(0, *p.shape[1:])
        grad = torch.sparse_coo_tensor(index, rows, p.shape, check_invariants=False)
    elif not grad.is_sparse:  # a rank that used the matrix elsewhere as well
        grad = grad.to_sparse(1)
    early = grad.dtype == torch.float16
    grad = grad / divisor if early else grad
    if group is not None:
        with named("sparse gradients (sync_gradients)", group):
            dist.all_reduce(grad, group=group)
    return grad.coalesce() if early else grad.coalesce() / divisor


def _summed_part(p: DTensor, grad: Tensor) -> Tensor:
    """A gradient of a parameter that is whole on each rank: this rank's part of the sum, laid out as the sum will be.

    DTensor leaves parts of a sum (`Partial`) as they are. What it did sum is shared out again, so that all ranks take
    part in one reduction whatever they hold.
    """
    assert isinstance(grad, DTensor)
    part = _held(grad)
    if _is_whole(grad):
        part = part / grad.device_mesh.size()
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False)


def _buckets(grads: list[Tensor], limit: int = 1 << 25) -> list[list[Tensor]]:
    """Gradients in lists of one dtype and device, each of `limit` bytes or of one tensor."""
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
