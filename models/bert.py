"""BERT (arXiv:1810.04805): a bidirectional encoder for masked-token prediction, with MoE layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Block, Context, Hidden, RotaryConfig, active_parameters, check_hidden, check_tokens, norm, rotary
from .dropout import Dropout
from .recompute import Blocks


@dataclass(frozen=True, kw_only=True)
class BERTConfig(RotaryConfig):
    """Sizes of a `BERT`. The defaults fit text that is read as bytes, with a few spare ids for special tokens.

    The arguments are `rope_base`, the fields of `turnout.models.blocks.Config`, and these:

    Args:
        mask_token: id that replaces a masked token. Ids below it are text.
        segments: number of segment embeddings, 2 for BERT's sentences A and B. 0, the default, has none.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    vocab: int = 264
    mask_token: int = 256
    segments: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_token < self.vocab:
            raise ValueError(f"mask_token={self.mask_token} must lie between 1 and vocab - 1 = {self.vocab - 1}")


class BERT(nn.Module):
    """Bidirectional encoder with BERT's head: a linear layer, GELU, a norm, and the embedding again.

    It has the blocks of `GPT` without the causal mask. Three things differ from the original BERT. The norm comes
    first in a block (arXiv:1909.08053, section 5.3). Positions are rotary, as in ModernBERT (arXiv:2412.13663).
    Segments are optional: they carry nothing without next-sentence prediction (arXiv:1907.11692). The same
    `torch.manual_seed` gives the same model at every world size.

    Args:
        config: sizes of the whole model.
        kept: range of blocks, counted from 0, that this pipeline stage holds. None, the default, is all of them. The
            first block comes with the embeddings. The last comes with the norms and the head, and with the embedding
            again. Parts that are not kept are None, so names and initial values stay as in the whole model.

    References:
        Devlin et al., BERT, arXiv:1810.04805.

    >>> import torch
    >>> model = BERT(BERTConfig(dim=32, layers=2, heads=2, hidden=16, num_experts=4, seq_len=8))
    >>> model(torch.full((3, 8), model.config.mask_token)).shape
    torch.Size([3, 8, 264])
    """

    def __init__(self, config: BERTConfig, kept: range | None = None) -> None:
        super().__init__()
        self.config = config
        kept = range(config.layers) if kept is None else kept
        first, last = 0 in kept, config.layers - 1 in kept
        embed = nn.Embedding(config.vocab, config.dim)
        segment = nn.Embedding(config.segments, config.dim) if config.segments else None
        self.embed = embed if first or last else None
        self.segment = segment if first else None
        self.dropout = Dropout(config.dropout)
        self.blocks = Blocks.of((Block(config, index) for index in range(config.layers)), kept)
        head = nn.Linear(config.dim, config.dim, bias=False)
        self.norm, self.head, self.head_norm = (norm(config), head, norm(config)) if last else (None, None, None)
        for part in (embed, segment, head):  # kept or not, as the blocks
            if part is not None:
                nn.init.normal_(part.weight, std=0.02)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None, hidden: Hidden = ()
    ) -> Tensor | Hidden:
        """Compute the logits of the token at each position.

        A pipeline stage gets the same tokens, mask and segments as the whole model.

        Args:
            tokens: token ids, int64 [B, S], with S at most ``config.seq_len``.
            mask: bool [B, S], False = padding: no token attends to it, and it goes to no expert. None, the default,
                has no padding.
            segments: segment of each token, int64 [B, S], if the config has segments. None, the default, puts all
                tokens into segment 0.
            hidden: what the stage before returned, for a later pipeline stage; () by default.

        Returns:
            Logits [B, S, vocab]. At padding they are finite, and mean nothing. A stage without the last block returns
            its hidden states, a tuple of [B, S, D].

        Raises:
            ValueError: shapes or a dtype that do not fit, segments that the config does not have, or hidden states that
                a stage lacks.
        """
        config = self.config
        self.check_inputs(tokens, mask, segments)
        check_hidden(hidden, 0 if self.blocks[0] is not None else 1)
        x = hidden[0] if hidden else self._embedded(tokens, segments)
        attn_mask = None if mask is None else mask[:, None, None, :]
        cos, sin = rotary(config.seq_len, config.head_size, config.rope_base, x.device)
        x = self.blocks(x, Context(tokens, mask, cos, sin, attn_mask))
        if self.norm is None or self.head is None or self.head_norm is None or self.embed is None:
            return (x,)
        x = self.head_norm(F.gelu(self.head(self.norm(x))))
        return F.linear(x, self.embed.weight)

    def check_inputs(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> None:
        """Raise a ValueError for inputs that do not fit. A pipeline calls it on every rank before any waits."""
        check_tokens(tokens, self.config, mask)
        if segments is not None and not self.config.segments:
            raise ValueError("segments were given, but the config has none: set BERTConfig(segments=2), or omit them")
        if segments is not None and (segments.shape != tokens.shape or segments.dtype != torch.int64):
            raise ValueError(
                f"segments must be int64 {tuple(tokens.shape)}; got {segments.dtype} {tuple(segments.shape)}"
            )

    def _embedded(self, tokens: Tensor, segments: Tensor | None) -> Tensor:
        assert self.embed is not None
        x = self.embed(tokens)
        if self.segment is not None:
            x = x + self.segment(torch.zeros_like(tokens) if segments is None else segments)
        return self.dropout(x)

    def active_parameters(self) -> int:
        """Number of matrix parameters that one token uses: an MoE layer counts with its router and top_k experts."""
        return active_parameters(self)

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """FLOPs of one token's forward and backward: 6 per active parameter, plus attention.

        Args:
            seq_len: number of tokens in a sequence. None, the default, is ``config.seq_len``.
        """
        config = self.config
        span = config.seq_len if seq_len is None else seq_len
        return 6 * self.active_parameters() + 12 * config.heads * config.head_size * span * config.layers
