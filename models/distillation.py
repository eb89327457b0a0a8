"""Distillation: a small or dense student learns from a trained model with experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..dispatch.reorder import wide
from ..moe.experts.placed import check_home
from ..moe.experts.sharded import held_slice, local, whole
from .loss import IGNORED, next_token_loss


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, alpha: float = 0.25, temperature: float = 1.0
) -> Tensor:
    """Loss of a student: (1 - alpha) times cross entropy of the targets, alpha times divergence from a teacher.

    The divergence is KL(teacher || student), the mean over targets, in float32 or wider. With a temperature both
    distributions are softened, and the divergence is multiplied by its square, so that gradients keep their size.

    Args:
        logits: the student's, [B, S, vocab].
        teacher_logits: the teacher's, of the same shape. They get no gradient.
        targets: token after each one, int64 [B, S]. -100 leaves a position out.
        alpha: share of the teacher, in [0, 1]; 0.25 by default, as in Switch Transformers.
        temperature: divisor of both logits, positive; 1.0 by default.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes or numbers that do not fit.
        TypeError: logits that `tensor_parallel` has split.

    References:
        Hinton et al., arXiv:1503.02531. Switch Transformers, arXiv:2101.03961, section 4.2.

    >>> logits, targets = torch.randn(2, 3, 8), torch.randint(8, (2, 3))
    >>> alone, taught = (distillation_loss(logits, logits, targets, alpha) for alpha in (0.0, 0.5))
    >>> torch.allclose(taught, alone / 2)  # the student says what the teacher says
    True
    """
    if isinstance(logits, DTensor) or isinstance(teacher_logits, DTensor):
        raise TypeError("logits are split over the vocabulary: distil with tp=1 for both models")
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"logits of the student are {tuple(logits.shape)}, and of the teacher {tuple(teacher_logits.shape)}: both "
            "need one vocabulary"
        )
    if logits.ndim != 3 or targets.shape != logits.shape[:2]:
        raise ValueError(
            f"logits must be [B, S, vocab], and targets [B, S]; got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    if not 0 <= alpha <= 1 or not temperature > 0:
        raise ValueError(f"alpha must lie in [0, 1], and temperature above 0; got {alpha} and {temperature}")
    task = next_token_loss(logits, targets)
    known = targets.flatten() != IGNORED
    # zeros where a target is left out: NaN there would get into gradients
    student, teacher = (
        (wide(x.flatten(0, 1)).masked_fill(~known[:, None], 0) / temperature).log_softmax(-1)
        for x in (logits, teacher_logits.detach())
    )
    apart = F.kl_div(student, teacher, reduction="none", log_target=True)
    apart = apart.masked_fill(teacher == -torch.inf, 0).sum() / known.sum()  # 0 log 0: ids that the teacher rules out
    return (1 - alpha) * task + alpha * temperature**2 * apart


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Copy into a student the teacher's parameters of the same name and shape, in place. All ranks call it.

    A dense student has all but the experts then (Switch Transformers). A student with fewer blocks has the first ones
    (Mixture-of-Students), with their experts if these are of one shape.

    Args:
        student: model to initialise, such as ``GPT(replace(config, moe_every=0))``.
        teacher: trained model.

    Returns:
        Names of the student's parameters that keep their initial values.

    Raises:
        ValueError: no parameter fits, or `place_experts` has moved the teacher's experts.

    References:
        Switch Transformers, arXiv:2101.03961, section 4.2. Mixture-of-Students: DeepSpeed-MoE, arXiv:2201.05596,
        section 4.2.
    """
    check_home(teacher, "inherit")
    check_home(student, "inherit")
    theirs, left, taken = dict(teacher.named_parameters()), [], 0
    for name, p in student.named_parameters():
        if name in theirs and theirs[name].shape == p.shape:
            local(p).copy_(whole(theirs[name].detach())[held_slice(p)])
            taken += 1
        else:
            left.append(name)
    if not taken:
        raise ValueError("the student has no parameter of the teacher: build both of one class, with one width")
    return left
