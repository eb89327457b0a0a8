"""One stage of a pipeline: what it adds to a forward of its part of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage

from ...moe.auxiliary import aux_loss
from .boundary import Boundary


class Stage(PipelineStage):
    """A stage that adds the gradients of its balance losses, and sends its part of hidden states."""

    boundary: Boundary
    weight: float  # of a micro-batch in the mean
    aux: list[Tensor]  # balance losses of the micro-batches of a step, without graphs

    def forward_maybe_with_nosync(self, x: Tensor, **options: Any) -> Tensor:
        """What torch calls for each micro-batch: token ids or what was received -> logits or what is sent."""
        y = super().forward_maybe_with_nosync(x if self.is_first else self.boundary.arrive(x), **options)
        aux = aux_loss(self.submod, keep=False)  # a backward in halves frees no graph that something refers to
        self.aux.append(aux.detach())
        if aux.requires_grad:
            y = AddLoss.apply(y, aux * self.weight)
        return y if self.is_last else self.boundary.leave(y)


class AddLoss(torch.autograd.Function):
    """x, unchanged; when its gradient comes, the loss gets one too, as if it had been added to the task's loss."""

    @staticmethod
    def forward(ctx, x, loss):
        """x of any shape, loss a scalar."""
        ctx.save_for_backward(loss)
        return x.detach()  # not a view: zero-bubble schedules detach the output in place

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient of x, and 1."""
        return grad, torch.ones_like(ctx.saved_tensors[0])


def keep_gathered(parts: nn.ModuleList) -> None:
    """FSDP2 gathers parameters once a step: in a backward in two halves, those freed in between get no gradient."""
    for part in parts:
        sharded = [module for module in part.modules() if isinstance(module, FSDPModule)]
        if sharded and not isinstance(part, FSDPModule):
            raise ValueError("layers of a stage are sharded, and the stage is not: call fully_shard on it as well")
        for module in sharded:
            module.set_reshard_after_forward(False)
