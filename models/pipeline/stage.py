"""One pipeline stage: adds its balance losses to the backward, and splits hidden states over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage

from ...moe.auxiliary import aux_loss
from .boundary import Boundary


class Stage(PipelineStage):
    """Stage of torch's pipeline that adds the gradients of its balance losses, and sends its part of hidden states."""

    boundary: Boundary
    weight: float  # weight of a micro-batch in the mean
    aux: list[Tensor]  # balance loss of each micro-batch of the step, detached

    def forward_maybe_with_nosync(self, *received: Tensor, **inputs: Tensor) -> Any:
        """Forward of one micro-batch, called by torch: received hidden states -> logits, or hidden states to send.

        `inputs` are those of the whole model, in its order. The first stage gets one of them as `received`, too.
        """
        hidden = () if self.is_first else tuple(map(self.boundary.arrive, received))
        output = super().forward_maybe_with_nosync(*inputs.values(), hidden=hidden)
        x, *others = (output,) if self.is_last else output
        aux = aux_loss(self.submod, keep=False)  # a backward in two halves could not free a graph that is kept
        self.aux.append(aux.detach())
        if aux.requires_grad:
            x = AddLoss.apply(x, aux * self.weight)
        return x if self.is_last else tuple(map(self.boundary.leave, (x, *others)))


class AddLoss(torch.autograd.Function):
    """Return x unchanged, and give `loss` a gradient of 1 in the backward, as if it were added to the task's loss."""

    @staticmethod
    def forward(ctx, x, loss):
        """Return x of any shape; `loss` is a scalar."""
        ctx.save_for_backward(loss)
        return x.detach()  # not a view: zero-bubble schedules detach the output in place

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of x and of the loss."""
        return grad, torch.ones_like(ctx.saved_tensors[0])


def nothing_left() -> Callable[..., None]:
    """Builder of a backward's second half for stages whose first half is the whole backward: those of a T5.

    torch cannot take it in halves. A parameter that several blocks of a stage use, such as a table of biases, joins
    their nodes, and the second half would run some of them twice (2.13).
    """
    return lambda: None


def keep_gathered(parts: nn.ModuleList) -> None:
    """Make FSDP2 gather parameters once a step.

    In a backward in two halves, parameters that are freed in between get no gradient.
    """
    for part in parts:
        sharded = [module for module in part.modules() if isinstance(module, FSDPModule)]
        if sharded and not isinstance(part, FSDPModule):
            raise ValueError("layers of a stage are sharded, but the stage is not: call fully_shard on it as well")
        for module in sharded:
            module.set_reshard_after_forward(False)
