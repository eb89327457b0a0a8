"""An encoder that sees both sides of a token, trained to fill in the masked ones (BERT, arXiv:1810.04805)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Block, Context, RotaryConfig, active_parameters, check_tokens, norm, rotary
from .dropout import Dropout
from .recompute import Blocks


@dataclass(frozen=True, kw_only=True)
class BERTConfig(RotaryConfig):
    """Sizes of a `BERT`. The defaults read bytes, and have a few ids to spare for tokens of one's own."""

    vocab: int = 264
    mask_token: int = 256  # the ids below are text; those from here on never stand in for a token
    segments: int = 0  # kinds of segments that have an embedding, as BERT's sentences A and B; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_token < self.vocab:
            raise ValueError(f"mask_token={self.mask_token} must lie between 1 and vocab - 1 = {self.vocab - 1}")


class BERT(nn.Module):
    """The blocks of `GPT` without the causal mask, and BERT's head: a linear layer, GELU, norm, the embedding again.

    It differs from arXiv:1810.04805 where later work found better: the norm comes first in a block (arXiv:1909.08053,
    section 5.3), positions are rotary (arXiv:2104.09864 trains BERT so; ModernBERT, arXiv:2412.13663), which need no
    parameters and are the same code as in `GPT`, and segments are optional, since without next-sentence prediction
    (arXiv:1907.11692) they say nothing. Built under one `torch.manual_seed`, it is the same model at every world size.
    """

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.dim)
        self.segment = nn.Embedding(config.segments, config.dim) if config.segments else None
        self.dropout = Dropout(config.dropout)
        self.blocks = Blocks(Block(config, index + 1) for index in range(config.layers))
        self.norm = norm(config)
        self.head = nn.Linear(config.dim, config.dim, bias=False)
        self.head_norm = norm(config)
        for part in (self.embed, self.segment, self.head):
            if part is not None:
                nn.init.normal_(part.weight, std=0.02)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Token ids int64 [B, S] -> logits [B, S, vocab] of the token at each place; S is at most `seq_len`.

        Args:
            mask: bool [B, S], False = padding: no token attends to it, and it goes to no expert. What comes out at
                its places means nothing, but is finite.
            segments: int64 [B, S], which segment each token is of, if the config has segments; None: the first.
        """
        check_tokens(tokens, self.config, mask)
        x = self.embed(tokens)
        if self.segment is not None:
            x = x + (self.segment.weight[0] if segments is None else self.segment(segments))
        elif segments is not None:
            raise ValueError("segments were given, but the config has none: set segments=2")
        attn_mask = None if mask is None else mask[:, None, None, :]
        config = self.config
        cos, sin = rotary(config.seq_len, config.head_size, config.rope_base, x.device)
        x = self.blocks(self.dropout(x), Context(tokens, mask, cos, sin, attn_mask))
        x = self.head_norm(F.gelu(self.head(self.norm(x))))
        return F.linear(x, self.embed.weight)

    def active_parameters(self) -> int:
        """Parameters a token meets in matrix products: of an MoE block top_k experts, and the router."""
        return active_parameters(self)
