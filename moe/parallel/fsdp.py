"""`fully_shard_experts` shards the experts of a parallelized model with FSDP2."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ...dispatch import mesh as axes
from ...dispatch.mesh import Meshes
from ..experts.base import Experts
from ..experts.sharded import local
from ..layer import MoE, moe_layers
from ..names import called
from .parallelize import expert_parameters

Model = TypeVar("Model", bound=nn.Module)


def fully_shard_experts(model: Model, mesh: DeviceMesh | Meshes, **options: Any) -> Model:
    """Shard the experts of a parallelized model over the axis "edp" with FSDP2, with the right gradient divisor.

    Afterwards wrap the rest with ``fully_shard(model, mesh=...)`` over all ranks of the mesh. By itself, FSDP2 would
    divide an expert's gradient by the number of ranks that hold the expert. The loss is averaged over all ranks that
    have a part of the batch, so that is the divisor set here.

    Args:
        model: model after `parallelize`.
        mesh: mesh that `parallelize` got.
        options: further arguments of `torch.distributed.fsdp.fully_shard`.

    Returns:
        The model.

    Raises:
        ValueError: the mesh lacks "edp" or "ep", layers share parameters but not the `Experts` module, a parameter
            splits on no axis, or FSDP2 would divide gradients twice.
    """
    averaged, mesh = axes.data_mesh(mesh).size(), axes.of_experts(mesh)
    edp = axes.axis(mesh, axes.EDP)
    if edp is None or axes.axis(mesh, axes.EP) is None:
        raise ValueError(f"fully_shard_experts needs a mesh with axes edp and ep; got axes {axes.names(mesh)}")
    policy = options.get("mp_policy", MixedPrecisionPolicy())
    place = partial(_fsdp_axis, ranks=edp.size())
    layers = moe_layers(model)
    _check_untied(layers)
    for name, p in expert_parameters(model).items() if "shard_placement_fn" not in options else ():
        if place(p) is None:
            raise ValueError(
                f"the part of {name} on each rank, {tuple(local(p).shape)}, does not split over edp={edp.size()} on "
                "any axis: change its sizes or edp, or use sync_gradients in place of FSDP2"
            )
    for experts in dict.fromkeys(layer.experts for layer in layers.values()):
        learned = next((p.dtype for p in experts.parameters() if p.is_floating_point()), torch.float32)  # or 4 bits
        reduced = policy.reduce_dtype or policy.param_dtype or learned
        if edp.size() == 1 and reduced not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"with edp=1, FSDP2 divides {reduced} gradients twice (torch 2.13); pass "
                "mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32)"
            )
        wrapped = cast(FSDPModule, fully_shard(experts, mesh=edp, **{"shard_placement_fn": place, **options}))
        wrapped.set_gradient_divide_factor(float(averaged))
        # gloo has no scaled sum. With one rank to reduce over, forcing plain sums divides twice (torch 2.13).
        wrapped.set_force_sum_reduction_for_comms(edp.size() > 1)
    return model


def _check_untied(layers: dict[str, MoE]) -> None:
    """Raise ValueError if two `Experts` modules share a parameter: FSDP2 would turn it into two."""
    owner: dict[int, tuple[str, Experts]] = {}
    for name, layer in layers.items():
        for p in layer.experts.parameters():
            first, experts = owner.setdefault(id(p), (name, layer.experts))
            if experts is not layer.experts:
                raise ValueError(
                    f"{called(first)} and {called(name)} share expert parameters, which FSDP2 would copy: let both "
                    "have the same Experts module, or leave fully_shard_experts out"
                )


def _fsdp_axis(p: nn.Parameter, ranks: int) -> Shard | None:
    """The axis on which FSDP2 splits a stacked parameter, or None. It prefers an axis that no mesh axis splits yet.

    On axes other than 0, FSDP2 only splits evenly (torch 2.13).
    """
    taken = {placed.dim for placed in p.placements if isinstance(placed, Shard)} if isinstance(p, DTensor) else {0}
    free = [axis for axis in range(p.ndim) if axis not in taken]
    held = local(p).shape
    return next((Shard(axis) for axis in (*free, *sorted(taken, reverse=True)) if held[axis] % ranks == 0), None)
