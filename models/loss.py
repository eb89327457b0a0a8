"""The training objective of a language model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from ..dispatch.reorder import wide


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats, a scalar: logits [B, S, vocab], targets int64 [B, S], the token after each.

    Taken in float32 or wider.
    Logits split over the vocabulary, as `tensor_parallel` leaves them, are never gathered: the ranks exchange
    a largest logit, a sum and the target's logit per token (Megatron-LM, arXiv:1909.08053, section 3).
    """
    flat = wide(logits.flatten(0, 1))
    targets = targets.flatten()
    if isinstance(flat, DTensor):
        return _SplitCrossEntropy.apply(flat, targets)  # pyright: ignore[reportReturnType]
    return F.cross_entropy(flat, targets)


class _SplitCrossEntropy(torch.autograd.Function):
    """torch's loss_parallel, whose backward must run inside its context: here it runs along with the forward."""

    @staticmethod
    def forward(ctx, logits, targets):
        with loss_parallel(), torch.enable_grad():
            logits = logits.detach().requires_grad_(ctx.needs_input_grad[0])
            loss = F.cross_entropy(logits, targets)
            if logits.requires_grad:
                ctx.save_for_backward(*torch.autograd.grad(loss, logits))
        return loss.detach().full_tensor()  # pyright: ignore[reportAttributeAccessIssue]

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # what was saved is a number to autograd: second derivatives would lack it
            raise RuntimeError("the loss of split logits has no second derivative: leave out create_graph=True, or tp")
        (to_logits,) = ctx.saved_tensors
        local = to_logits.to_local() * grad
        return DTensor.from_local(local, to_logits.device_mesh, to_logits.placements, run_check=False), None
