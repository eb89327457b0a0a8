"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2), and the z-loss of the head.

Both are losses that training adds to that of the next token. `GPT.forward` computes them where the logits are, and
`aux_loss` returns them together with the losses of MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..moe.auxiliary import AuxiliaryLoss
from .blocks import Block, Config, Context, norm
from .loss import IGNORED, head_z_loss, next_token_loss
from .recompute import Blocks


class Depth(nn.Module):
    """One module of multi-token prediction: hidden states of depth k - 1 and the k-th next tokens -> those of depth k.

    Args:
        config: sizes. The block has experts if the model's last one does, and no window.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.join = Join(config)
        self.blocks = Blocks([Block(config, config.layers - 1, causal=True)])
        self.norm = norm(config)

    def forward(self, x: Tensor, embedded: Tensor, context: Context) -> Tensor:
        """Hidden states x [B, S, D] and embeddings of the k-th next tokens [B, S, D] -> hidden states [B, S, D]."""
        return self.blocks(self.join(x, embedded), context)


class Join(nn.Module):
    """Joins hidden states and embeddings: both are normalised, and a matrix [D, 2 D] brings them back to width D."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.hidden_norm, self.embedding_norm = norm(config), norm(config)
        self.project = nn.Linear(2 * config.dim, config.dim, bias=False)
        nn.init.normal_(self.project.weight, std=0.02)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """x [B, S, D] and embeddings [B, S, D] -> [B, S, D]."""
        return self.project(torch.cat([self.hidden_norm(x), self.embedding_norm(embedded)], dim=-1))


class HeadLosses(AuxiliaryLoss):
    """The losses of a training step that belong to the head: z-loss, and the mean loss of all depths.

    The loss of a depth is the sum over its targets, divided by the number of all positions (eq. 24). Documents end at
    other places in each sequence, so the number of targets differs between micro-batches. A mean over targets would
    make gradients depend on how the batch is cut.

    Args:
        z_loss: weight of the z-loss.
        mtp_weight: weight of the mean over depths.
        eod: as for `further_targets`.

    Attributes:
        own: function that takes this rank's part of targets; `context_parallel` sets it, and `group`.
        group: ranks with other parts of the same sequences; None: this rank alone.
    """

    own: Callable[[Tensor], Tensor] = staticmethod(lambda targets: targets)
    group: ProcessGroup | None = None

    def __init__(self, z_loss: float, mtp_weight: float, eod: int | None = None) -> None:
        super().__init__()
        self.z_loss, self.mtp_weight, self.eod = z_loss, mtp_weight, eod

    def forward(self, logits: Tensor, targets: Tensor, further: list[Tensor]) -> Tensor:
        """Weighted sum of the losses, a scalar, which `aux_loss` returns.

        Args:
            logits: of this rank's part of the sequences, [B, S, vocab].
            targets: token after each one, int64 [B, S], of whole sequences.
            further: logits of depth 1, 2 and so on, each as `logits`.
        """
        losses, positions = [], targets.numel()
        if self.z_loss:
            losses.append(self.z_loss * head_z_loss(logits, self.own(targets), self.group))
        for depth, each in enumerate(further, 1):
            loss = next_token_loss(each, self.own(further_targets(targets, depth, self.eod)), self.group, positions)
            losses.append(self.mtp_weight / len(further) * loss)
        total = torch.stack(losses).sum()
        self.keep(total, logits)
        return total


def further_targets(targets: Tensor, depth: int, eod: int | None = None) -> Tensor:
    """The token that is `depth` positions behind each target, int64 [B, S]; -100 if it or one on the way is missing.

    If an end-of-document token `eod` is on the way, the token belongs to another document, and is left out as well.

    >>> further_targets(torch.tensor([[1, 2, -100, 4, 5]]), depth=1).tolist()
    [[2, -100, -100, 5, -100]]
    """
    missing, found = targets == IGNORED, targets
    for _ in range(depth):
        missing = missing if eod is None else missing | (found == eod)
        found = torch.cat([found[:, 1:], torch.full_like(found[:, :1], IGNORED)], dim=1)
        missing = missing | (found == IGNORED)
    return found.masked_fill(missing, IGNORED)
