"""Cross entropy of next tokens and z-loss of the head, for whole logits and for logits split over the vocabulary."""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from ..dispatch.collectives import all_reduce
from ..dispatch.reorder import wide

IGNORED = -100  # target of a position without a loss, as in torch's cross_entropy


def next_token_loss(
    logits: Tensor, targets: Tensor, group: ProcessGroup | None = None, positions: int | None = None
) -> Tensor:
    """Mean cross entropy of next tokens, in nats, computed in float32 or wider.

    Logits that `tensor_parallel` has split over the vocabulary are never gathered. The ranks exchange three numbers
    per token: the largest logit, the sum of exponentials, and the target's logit.

    Args:
        logits: [B, S, vocab] in any floating dtype, or a DTensor of that shape.
        targets: token after each one, int64 [B, S]. -100 leaves a position out.
        group: ranks along "cp", which have other parts of the same sequences (`context_parallel`). None, the default,
            is this rank alone.
        positions: number to divide the sum by, on all ranks of `group` together. None, the default, is the number of
            positions that are not left out, whose mean depends on how a batch is cut if their number differs.

    Returns:
        The mean as a scalar, over the tokens of all ranks of `group`. Their gradients are summed, not averaged.

    References:
        Megatron-LM, arXiv:1909.08053, section 3.

    >>> next_token_loss(torch.zeros(2, 3, 8), torch.tensor([[0, 1, 2], [3, 4, -100]])).exp().round().item()
    8.0
    """
    flat = wide(logits.flatten(0, 1))
    targets = targets.flatten()
    how = "mean" if group is None and positions is None else "sum"
    if isinstance(flat, DTensor):
        loss = cast(Tensor, _SplitCrossEntropy.apply(flat, targets, how))
    else:
        loss = F.cross_entropy(flat, targets, reduction=how)
    if positions is not None:
        return (loss if group is None else all_reduce(loss, group, averaged=False)) / positions
    return loss if group is None else _mean(loss, targets, group)


def head_z_loss(logits: Tensor, targets: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Mean of logsumexp(logits)^2, which keeps logits from drifting (PaLM, arXiv:2204.02311, section 5).

    Args:
        logits, targets, group: as for `next_token_loss`. A position that is left out there is left out here.

    Returns:
        The mean as a scalar.

    >>> head_z_loss(torch.zeros(1, 2, 8), torch.tensor([[0, 1]])).sqrt().exp().round().item()
    8.0
    """
    flat = wide(logits.flatten(0, 1))
    targets = targets.flatten()
    if isinstance(flat, DTensor):
        totals = cast(Tensor, _SplitLogSumExp.apply(flat.to_local(), flat.device_mesh.get_group()))
    else:
        totals = flat.logsumexp(-1)
    return _mean(torch.where(targets == IGNORED, 0, totals.square()).sum(), targets, group)


def _mean(total: Tensor, targets: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of terms, one for each target of this rank, divided by the number of targets in the group."""
    number = (targets != IGNORED).sum()
    if group is not None:
        total, number = all_reduce(torch.stack([total, number.to(total.dtype)]), group, averaged=False)
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


class _SplitLogSumExp(torch.autograd.Function):
    """logsumexp of logits [N, vocab / t] whose vocabulary is split over a group: [N], equal on all ranks."""

    @staticmethod
    def forward(ctx, logits, group):
        top = logits.amax(-1)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        total = (logits - top.unsqueeze(-1)).exp().sum(-1)
        dist.all_reduce(total, group=group)
        totals = top + total.log()
        ctx.save_for_backward(logits, totals)
        return totals

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, totals = ctx.saved_tensors
        return grad.unsqueeze(-1) * (logits - totals.unsqueeze(-1)).exp(), None
