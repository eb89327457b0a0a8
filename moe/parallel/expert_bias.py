"""Expert-bias update after the optimizer's step (loss-free balancing of sigmoid gates), the same on all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from ...dispatch.failure import named
from ..gates.biased import BiasedGate
from ..layer import MoE


@torch.no_grad()
def update_expert_biases(model: nn.Module) -> None:
    """Move the bias of every `BiasedGate` of a model by one step, from the loads of the forwards since the last call.

    Call it once a step on every rank, with or without gradient accumulation or a pipeline. The optimizer can do so:
    ``optimizer.register_step_post_hook(lambda *_: update_expert_biases(model))``. Loads are summed over the ranks that
    `parallelize` was told share the batch, in one all-reduce for all layers, so that biases stay equal.
    """
    gates: dict[tuple[ProcessGroup | None, ...], list[BiasedGate]] = {}
    for layer in model.modules():
        if isinstance(layer, MoE) and isinstance(layer.gate, BiasedGate):
            gates.setdefault((layer.balance_group, layer.sequence_group), []).append(layer.gate)
    for groups, alike in gates.items():
        loads = torch.cat([gate.load for gate in alike])
        for group in groups:
            if group is not None:
                with named("loads (update_expert_biases)", group):
                    dist.all_reduce(loads, group=group)
        for gate, load in zip(alike, loads.split([gate.num_experts for gate in alike]), strict=True):
            gate.load.copy_(load)
            gate.update_bias()
