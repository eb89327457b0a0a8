"""`aux_loss`: the auxiliary losses of all MoE layers of a model, as one scalar."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .build import called
from .layer import MoE


def aux_loss(model: nn.Module, keep: bool = True) -> Tensor:
    """Weighted sum of the auxiliary losses of all `MoE` layers of a model: add it to the task's loss in each step.

    For a layer in training mode it covers every forward since the last backward or the last `aux_loss`. So run trial
    forwards in eval mode or under `torch.no_grad`; evaluations in between change nothing. For a layer in eval mode it
    covers the last forward.

    Args:
        model: a module with `MoE` layers anywhere in it.
        keep: whether layers keep the losses and their graphs until their next forward; True by default.

    Returns:
        A scalar, 0 for a model without MoE layers.

    Raises:
        RuntimeError: the loss of a layer in training mode has no graph, so that its gate would get no gradient. One of
            its forwards ran without gradients, as under re-entrant activation checkpointing, or the last forward ran
            in eval mode.

    >>> model = nn.Sequential(MoE(dim=4, hidden=8, num_experts=2, top_k=1), nn.Linear(4, 1))
    >>> loss = model(torch.randn(10, 4)).square().mean()
    >>> (loss + aux_loss(model)).backward()
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
                "without gradients. Call aux_loss before an evaluation, and pass use_reentrant=False to checkpoint"
            )
        losses += own
    if losses:
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
    parameter = next(model.parameters(), None)
    return torch.zeros((), device=None if parameter is None else parameter.device)
