"""The losses of all layers of a model as one number."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .build import called
from .layer import MoE


def aux_loss(model: nn.Module, keep: bool = True) -> Tensor:
    """The weighted balance losses of all `MoE` layers of a model, a scalar to add to the task's loss.

    Of a layer in training it covers every forward since the last backward (or the last `aux_loss`): try a model out
    in eval mode or under `torch.no_grad`. An evaluation in between changes nothing. Of a layer in eval mode it covers
    the last forward. A model without MoE layers gives 0.

    Args:
        model: a module with `MoE` layers anywhere in it.
        keep: False: layers let go of the losses and their graphs now, not with their next forward.

    Raises:
        RuntimeError: a layer in training whose loss has no graph: one of its forwards ran without gradients, as under
            re-entrant activation checkpointing, or the last one was an evaluation. The gate would get no gradient.
    """
    losses = []
    for name, layer in model.named_modules():
        if not isinstance(layer, MoE):
            continue
        own, evaluated = layer._losses.ask(layer.training, keep)
        learns = layer.training and torch.is_grad_enabled() and any(p.requires_grad for p in layer.gate.parameters())
        if learns and (evaluated or not all(loss.requires_grad for loss in own)):
            raise RuntimeError(
                f"the balance loss of {called(name)} has no graph: its last forward ran in eval mode or "
                "without gradients. Call aux_loss before you evaluate; torch.utils.checkpoint wants use_reentrant=False"
            )
        losses += own
    if losses:
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
    parameter = next(model.parameters(), None)
    return torch.zeros((), device=None if parameter is None else parameter.device)
