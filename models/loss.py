"""Cross entropy of next tokens, for whole logits and for logits split over the vocabulary."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from ..dispatch.collectives import all_reduce
from ..dispatch.reorder import wide


def next_token_loss(logits: Tensor, targets: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Mean cross entropy of next tokens, in nats, computed in float32 or wider.

    Logits that `tensor_parallel` has split over the vocabulary are never gathered. The ranks exchange three numbers
    per token: the largest logit, the sum of exponentials, and the target's logit.

    Args:
        logits: [B, S, vocab] in any floating dtype, or a DTensor of that shape.
        targets: token after each one, int64 [B, S]. -100 leaves a position out.
        group: ranks along "cp", which have other parts of the same sequences (`context_parallel`). None, the default,
            is this rank alone.

    Returns:
        The mean as a scalar, over the tokens of all ranks of `group`. Their gradients are summed, not averaged.

    References:
        Megatron-LM, arXiv:1909.08053, section 3.

    >>> next_token_loss(torch.zeros(2, 3, 8), torch.tensor([[0, 1, 2], [3, 4, -100]])).exp().round().item()
    8.0
    """
    flat = wide(logits.flatten(0, 1))
    targets = targets.flatten()
    how = "mean" if group is None else "sum"
    if isinstance(flat, DTensor):
        loss = cast(Tensor, _SplitCrossEntropy.apply(flat, targets, how))
    else:
        loss = F.cross_entropy(flat, targets, reduction=how)
    if group is None:
        return loss
    number = (targets != -100).sum()
    total, number = all_reduce(torch.stack([loss, number.to(loss.dtype)]), group, averaged=False)
    return total / number


class _SplitCrossEntropy(torch.autograd.Function):
    """Cross entropy by torch's `loss_parallel`, whose backward must run inside its context: so forward runs both."""

    @staticmethod
    def forward(ctx, logits, targets, how):
        with loss_parallel(), torch.enable_grad():
            logits = logits.detach().requires_grad_(ctx.needs_input_grad[0])
            loss = F.cross_entropy(logits, targets, reduction=how)
            if logits.requires_grad:
                ctx.save_for_backward(*torch.autograd.grad(loss, logits))
        return loss.detach().full_tensor()  # pyright: ignore[reportAttributeAccessIssue]

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # the saved gradient has no graph, so second derivatives would be wrong
            raise RuntimeError("the loss of split logits has no second derivative: leave out create_graph=True, or tp")
        (to_logits,) = ctx.saved_tensors
        local = to_logits.to_local() * grad
        return DTensor.from_local(local, to_logits.device_mesh, to_logits.placements, run_check=False), None, None
