"""A decoder-only transformer whose feed-forward blocks may be mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Block, Context, RotaryConfig, active_parameters, check_tokens, norm, rotary
from .dropout import Dropout
from .recompute import Blocks


@dataclass(frozen=True, kw_only=True)
class GPTConfig(RotaryConfig):
    """Sizes of a `GPT`. The defaults read bytes."""

    tied: bool = True  # the head is the embedding; False: a matrix of its own


class GPT(nn.Module):
    """Pre-norm blocks, rotary positions, fused causal attention, a head that is the embedding or a matrix of its own.

    Block i (from 1) is a mixture of experts where i is a multiple of `moe_every`. Built under one
    `torch.manual_seed`, it is the same model at every world size.

    Args:
        config: the sizes of the whole model.
        kept: the blocks, counted from 0, that this one holds as a stage of a pipeline; None: all of them. The first
            block comes with the embedding, the last with the norm and the head, which is the embedding again if
            ``config.tied``. The rest is None, so that names and initial values are those of the whole model.
    """

    def __init__(self, config: GPTConfig, kept: range | None = None) -> None:
        super().__init__()
        self.config = config
        kept = range(config.layers) if kept is None else kept
        first, last = 0 in kept, config.layers - 1 in kept
        embed = nn.Embedding(config.vocab, config.dim)
        self.embed = embed if first or (last and config.tied) else None
        self.blocks = Blocks()
        for index in range(config.layers):
            block = Block(config, index + 1, causal=True)  # dropped if not kept, having drawn its random numbers
            self.blocks.add_module(str(index), block if index in kept else None)
        self.norm = norm(config) if last else None
        self.dropout = Dropout(config.dropout)
        nn.init.normal_(embed.weight, std=0.02)
        head = None if config.tied else nn.Linear(config.dim, config.vocab, bias=False)
        if head is not None:
            nn.init.normal_(head.weight, std=0.02)
        self.head = head if last else None

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Token ids int64 [B, S] -> logits [B, S, vocab] of each next token; S is at most `seq_len`.

        A stage that does not begin with the first block is given the hidden states [B, S, D] of the stage before it,
        and the ids as `tokens`; one that does not end with the last block returns hidden states.
        """
        begins = not x.is_floating_point()
        tokens = x if begins else tokens
        if tokens is not None:
            check_tokens(tokens, self.config)
        if begins:
            if self.embed is None:
                raise ValueError("this stage has no embedding: give it the hidden states of the stage before it")
            x = self.dropout(self.embed(x))
        config = self.config
        cos, sin = rotary(config.seq_len, config.head_size, config.rope_base, x.device)
        x = self.blocks(x, Context(tokens, cos=cos, sin=sin))
        if self.norm is None:
            return x
        if self.head is not None:
            return self.head(self.norm(x))
        assert self.embed is not None
        return F.linear(self.norm(x), self.embed.weight)

    def active_parameters(self) -> int:
        """Parameters a token meets in matrix products: of an MoE block top_k experts, and the router."""
        table = 0 if self.embed is None or self.config.tied else self.embed.weight.numel()  # is looked up in
        return active_parameters(self) - table

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """Forward and backward: 6 per active parameter, and attention over `seq_len` positions unmasked."""
        seq_len = self.config.seq_len if seq_len is None else seq_len
        width = self.config.heads * self.config.head_size
        return 6 * self.active_parameters() + 12 * self.config.layers * width * seq_len
