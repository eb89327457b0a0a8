"""`load`: tokens per expert of all MoE layers, over all ranks and many forwards."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ...dispatch import mesh as axes
from ...dispatch.failure import named
from ...dispatch.mesh import Meshes
from ..layer import moe_layers
from ..stats import Load, measured


@torch.no_grad()
def load(model: nn.Module, mesh: DeviceMesh | Meshes | None = None) -> dict[str, Load]:
    """Tokens per expert of every `MoE` layer, over all ranks and all training forwards since the last call.

    Call it every n steps for the load of these n steps. Each call sets the counts to zero. All layers together take one
    all-reduce and one wait for the device. Between calls, layers count on their device.

    >>> from turnout.moe import MoE
    >>> model = nn.Sequential(MoE(8, 16, num_experts=4), MoE(8, 16, num_experts=4))
    >>> for step in range(3):
    ...     y = model(torch.randn(10, 8))
    >>> loads = load(model)
    >>> list(loads), loads["1"].tokens_per_expert.sum(), loads["1"].dropped  # 3 steps of 10 tokens, 2 experts each
    (['0', '1'], tensor(60), tensor(0., dtype=torch.float64))

    A forward counts if its layer is in training mode and its output requires a gradient. So micro-batches add up,
    recomputed activations count once, and evaluations do not count, in eval mode or under `torch.no_grad`. Forwards
    inside `torch.func` transforms, or under re-entrant activation checkpointing (``use_reentrant=True``), do not count
    either. If a layer is compiled by itself inside a checkpoint, it counts recomputed forwards twice: compile outside
    the checkpoint.

    Args:
        model: model that `parallelize` got, or a part of it.
        mesh: mesh that `parallelize` got. Every rank of it makes the call at the same point. None, the default, counts
            this rank alone.

    Returns:
        A `Load` for each layer name in ``model.named_modules()``, equal on all ranks of the mesh that have the layer.
        In a pipeline, each rank gets the layers of its own stages. Tensors are on the CPU, and shares in float64.

    Raises:
        DispatchError: a rank did not answer.
    """
    layers = moe_layers(model)
    if not layers:
        return {}
    taken = [layer._count.take() for layer in layers.values()]
    device = taken[0].device if mesh is None else axes.of_experts(mesh).device_type
    counts = torch.cat([each.to(device) for each in taken])
    if mesh is not None and (group := axes.token_group(mesh)) is not None:
        with named("loads of experts (load)", group):
            dist.all_reduce(counts, group=group)
    parts = counts.cpu().split([len(each) for each in taken])
    return {name: Load(*measured(part[:-1], part[-1], torch.float64)) for name, part in zip(layers, parts, strict=True)}
