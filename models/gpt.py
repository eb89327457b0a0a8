"""GPT: a decoder-only transformer with MoE layers in some or all of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Block, Context, Hidden, RotaryConfig, active_parameters, check_hidden, check_tokens, norm, rotary
from .documents import document_mask, documents_of
from .dropout import Dropout
from .loss import IGNORED
from .multi_token import Depth, HeadLosses, further_targets
from .recompute import Blocks


@dataclass(frozen=True, kw_only=True)
class GPTConfig(RotaryConfig):
    """Sizes of a `GPT`. The defaults fit text that is read as bytes.

    The arguments are `rope_base`, the fields of `turnout.models.blocks.Config`, and these:

    Args:
        tied: whether the embedding is the head's matrix as well; True by default. Otherwise the head has its own.
        eod: id of the end-of-document token, with which each document in a row of tokens begins. No token attends to
            another document, and the balance loss over "sequence" takes each document by itself. None, the default: a
            row is one document.
        windows: number of positions that a token attends to, itself included, in the first blocks. The pattern repeats:
            ``(1024, 1024, 0)`` has full attention in every third block. 0 is full attention, which all blocks have by
            default.
        mtp: number of further tokens that each position learns to predict in training (`turnout.models.multi_token`);
            0 by default. Each has a block of its own.
        mtp_weight: weight of the mean loss of further tokens, 0.3 by default.
        z_loss: weight of the z-loss of the head (`turnout.models.loss.head_z_loss`), 0 by default.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    tied: bool = True
    eod: int | None = None
    windows: Sequence[int] = ()
    mtp: int = 0
    mtp_weight: float = 0.3
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "windows", tuple(self.windows))
        if wrong := [size for size in self.windows if not isinstance(size, int) or size < 0]:
            raise ValueError(f"windows must be numbers of positions, 0 for full attention; got {wrong[0]!r} in it")
        for name in ("mtp", "mtp_weight", "z_loss"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more; got {getattr(self, name)}")

    def window(self, index: int) -> int:
        """Number of positions that a token attends to in a block, counted from 0; 0: all of them."""
        return self.windows[index % len(self.windows)] if self.windows else 0

    def moe_layers(self) -> list[str]:
        """Names of all MoE layers of the model, in their order."""
        further = range(self.mtp if self.has_experts(self.layers - 1) else 0)
        return [*super().moe_layers(), *(f"mtp.{depth}.blocks.0.feed_forward" for depth in further)]


class GPT(nn.Module):
    """Decoder-only language model: pre-norm blocks, rotary positions, fused causal attention.

    ``config.moe_every`` says which blocks have an MoE layer. The same `torch.manual_seed` gives the same model at every
    world size.

    Args:
        config: sizes of the whole model.
        kept: range of blocks, counted from 0, that this pipeline stage holds. None, the default, is all of them. The
            first block comes with the embedding. The last comes with the norm and the head, which is the embedding
            again if ``config.tied``. Parts that are not kept are None, so names and initial values stay as in the whole
            model.

    >>> import torch
    >>> config = GPTConfig(dim=32, layers=2, heads=2, hidden=16, num_experts=4, seq_len=8)
    >>> model = GPT(config)
    >>> model(torch.zeros(3, 8, dtype=torch.int64)).shape
    torch.Size([3, 8, 256])
    """

    def __init__(self, config: GPTConfig, kept: range | None = None) -> None:
        super().__init__()
        self.config = config
        kept = range(config.layers) if kept is None else kept
        first, last = 0 in kept, config.layers - 1 in kept
        embed = nn.Embedding(config.vocab, config.dim)
        self.embed = embed if first or (last and (config.tied or config.mtp)) else None
        blocks = (Block(config, i, causal=True, window=config.window(i)) for i in range(config.layers))
        self.blocks = Blocks.of(blocks, kept)
        self.norm = norm(config) if last else None
        self.dropout = Dropout(config.dropout)
        nn.init.normal_(embed.weight, std=0.02)
        head = None if config.tied else nn.Linear(config.dim, config.vocab, bias=False)
        if head is not None:
            nn.init.normal_(head.weight, std=0.02)
        self.head = head if last else None
        depths = nn.ModuleList(Depth(config) for _ in range(config.mtp))
        self.mtp = depths if last else nn.ModuleList()
        self.head_losses = (
            HeadLosses(config.z_loss, config.mtp_weight, config.eod) if config.mtp or config.z_loss else None
        )

    def forward(self, tokens: Tensor, targets: Tensor | None = None, hidden: Hidden = ()) -> Tensor | Hidden:
        """Compute the logits of each next token.

        Args:
            tokens: token ids, int64 [B, S], with S at most ``config.seq_len``, the same for all pipeline stages.
            targets: token after each one, int64 [B, S], -100 to leave a position out. Training needs them if the config
                has `mtp` or `z_loss`, whose losses `aux_loss` then returns. None by default.
            hidden: what the stage before returned, for a later pipeline stage; () by default.

        Returns:
            Logits [B, S, vocab]. A stage without the last block returns its hidden states, a tuple of [B, S, D].

        Raises:
            ValueError: ids of a wrong shape, hidden states that a stage lacks, or no targets where training needs them.
        """
        config = self.config
        self.check_inputs(tokens)
        check_hidden(hidden, 0 if self.blocks[0] is not None else 1)
        x = hidden[0] if hidden else self._embedded(tokens)
        cos, sin = rotary(config.seq_len, config.head_size, config.rope_base, x.device)
        mask = documents = None
        if config.eod is not None:
            documents = documents_of(tokens, config.eod)
            mask = document_mask(documents)
        context = Context(tokens, cos=cos, sin=sin, attn_mask=mask, documents=documents)
        x = self.blocks(x, context)
        if self.norm is None:
            return (x,)
        logits = self._logits(self.norm(x))
        if self.head_losses is not None and self.training and torch.is_grad_enabled():
            if targets is None:
                raise ValueError("mtp and z_loss need the targets in training: call model(tokens, targets=targets)")
            self.head_losses(logits, targets, self._further(x, targets, context))
        return logits

    def check_inputs(self, tokens: Tensor) -> None:
        """Raise a ValueError for inputs of a wrong shape. A pipeline calls it on every rank before any waits."""
        check_tokens(tokens, self.config)

    def _embedded(self, tokens: Tensor) -> Tensor:
        assert self.embed is not None
        return self.dropout(self.embed(tokens))

    def _logits(self, x: Tensor) -> Tensor:
        if self.head is not None:
            return self.head(x)
        assert self.embed is not None
        return F.linear(x, self.embed.weight)

    def _further(self, x: Tensor, targets: Tensor, context: Context) -> list[Tensor]:
        """Logits of further tokens, depth by depth, from the hidden states of the last block."""
        logits = []
        for number, depth in enumerate(self.mtp):
            assert isinstance(depth, Depth)
            tokens = further_targets(targets, number, self.config.eod)
            known = (tokens != IGNORED) & (tokens != self.config.eod)
            tokens = torch.where(known, tokens, 0)  # behind the end; its experts would see what is no token
            x = depth(x, self._embedded(tokens), context._replace(tokens=tokens, mask=known))
            logits.append(self._logits(depth.norm(x)))
        return logits

    def active_parameters(self) -> int:
        """Number of matrix parameters that one token uses: an MoE layer counts with its router and top_k experts."""
        # An embedding that is not the head as well is in no matrix product.
        table = 0 if self.embed is None or self.config.tied else self.embed.weight.numel()
        return active_parameters(self) - table

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """FLOPs of one token's forward and backward: 6 per active parameter, plus attention.

        Args:
            seq_len: number of positions that a token attends to, without a causal mask and outside of windows. None,
                the default, is ``config.seq_len``.
        """
        config = self.config
        seq_len = config.seq_len if seq_len is None else seq_len
        spans = [min(config.window(index) or seq_len, seq_len) for index in range(config.layers)]
        further = config.mtp * (config.vocab * config.dim + 2 * config.heads * config.head_size * seq_len)
        return 6 * (self.active_parameters() + further) + 12 * config.heads * config.head_size * sum(spans)
