"""`update_expert_biases`: loss-free balancing of sigmoid gates, the same on all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from ...dispatch.failure import named
from ..gates.biased import BiasedGate
from ..layer import moe_layers


@torch.no_grad()
def update_expert_biases(model: nn.Module) -> None:
    """Move the expert bias of every `BiasedGate` in a model by one step, against the load since the last call.

    Call it on every rank after each optimizer step, also with gradient accumulation or a pipeline. The optimizer can
    call it: ``optimizer.register_step_post_hook(lambda *_: update_expert_biases(model))``. Loads are first summed over
    the ranks that share the batch, in one all-reduce for all layers, so that biases stay equal on all ranks.

    Args:
        model: model with `MoE` layers, after `parallelize` if there are several ranks.

    References:
        Loss-free balancing: Wang et al. 2024, arXiv:2408.15664.

    >>> from turnout.moe import MoE
    >>> layer = MoE(dim=4, hidden=8, num_experts=2, top_k=1, gate="sigmoid")
    >>> y = layer(torch.randn(10, 4))
    >>> update_expert_biases(layer)
    >>> layer.gate.expert_bias.abs().max() <= 1e-3  # one step of the gate's rate, or 0 if loads were even
    tensor(True)
    """
    gates: dict[tuple[ProcessGroup | None, ...], list[BiasedGate]] = {}
    for layer in moe_layers(model).values():
        if isinstance(layer.gate, BiasedGate):
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
