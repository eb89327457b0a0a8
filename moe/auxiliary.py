"""`aux_loss`: the auxiliary losses of all MoE layers and other parts of a model, as one scalar."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .layer import MoE
from .losses import StepLosses
from .names import called


class AuxiliaryLoss(nn.Module):
    """Base of modules with a loss of their own that `aux_loss` adds to the task's. Their forward calls `keep`."""

    def __init__(self) -> None:
        super().__init__()
        self._losses = StepLosses()

    def keep(self, loss: Tensor, output: Tensor) -> None:
        """Keep the weighted loss of a training forward, a scalar, until `aux_loss`.

        Args:
            loss: the loss.
            output: what the model computes beside it. A backward through it ends the step, as for an `MoE`.
        """
        losses = self._losses
        if losses.forgotten:
            warnings.warn(
                f"the loss of {type(self).__name__} was left out of the last step: its backward ran, and nothing had "
                "called aux_loss(model). Add it once a step, loss = task_loss + aux_loss(model)",
                stacklevel=2,
            )
            losses.forgotten = False
        losses.let_go()
        step = losses.add(loss, self.training, loss.requires_grad)
        if output.requires_grad and not torch.compiler.is_compiling():
            output.register_hook(lambda _: losses.after_backward(step))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_losses": StepLosses()}  # a graph cannot be copied


def aux_loss(model: nn.Module, keep: bool = True) -> Tensor:
    """Weighted sum of the auxiliary losses of a model: add it to the task's loss in each step.

    They are the losses of all `MoE` layers, and of all other modules of the kind `AuxiliaryLoss`.

    For a layer in training mode it covers every forward since the last backward or the last `aux_loss`. So run trial
    forwards in eval mode or under `torch.no_grad`; evaluations in between change nothing. For a layer in eval mode it
    covers the last forward.

    Args:
        model: a module with such modules anywhere in it.
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
        if isinstance(layer, AuxiliaryLoss):
            losses += layer._losses.ask(layer.training, keep)[0]
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
