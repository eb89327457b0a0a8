"""GPT: a decoder-only transformer in which every n-th block has an MoE layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Block, Context, RotaryConfig, active_parameters, check_tokens, norm, rotary
from .documents import document_mask, documents_of
from .dropout import Dropout
from .recompute import Blocks


@dataclass(frozen=True, kw_only=True)
class GPTConfig(RotaryConfig):
    """Sizes of a `GPT`. The defaults fit text that is read as bytes.

    All arguments are keywords: `tied`, `eod`, `rope_base`, and the fields of `turnout.models.blocks.Config`. `tied`,
    True by default: the embedding is the head's matrix as well. Otherwise the head has its own. `eod`: id of the
    end-of-document token, with which each document in a row of tokens begins. No token attends to another document,
    and the balance loss over "sequence" takes each document by itself. None, the default: a row is one document.
    """

    tied: bool = True
    eod: int | None = None


class GPT(nn.Module):
    """Decoder-only language model: pre-norm blocks, rotary positions, fused causal attention.

    Block i, counted from 1, has an MoE layer where i is a multiple of ``config.moe_every``. The same
    `torch.manual_seed` gives the same model at every world size.

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
        self.embed = embed if first or (last and config.tied) else None
        self.blocks = Blocks()
        for index in range(config.layers):
            # every block is built, kept or not: it draws the random numbers that it would in the whole model
            block = Block(config, index + 1, causal=True)
            self.blocks.add_module(str(index), block if index in kept else None)
        self.norm = norm(config) if last else None
        self.dropout = Dropout(config.dropout)
        nn.init.normal_(embed.weight, std=0.02)
        head = None if config.tied else nn.Linear(config.dim, config.vocab, bias=False)
        if head is not None:
            nn.init.normal_(head.weight, std=0.02)
        self.head = head if last else None

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Compute the logits of each next token.

        Args:
            x: token ids, int64 [B, S], with S at most ``config.seq_len``. A later pipeline stage takes the hidden
                states [B, S, D] of the stage before it.
            tokens: token ids, int64 [B, S], for a later stage whose gates route by them, or whose documents begin with
                ``config.eod``; None by default.

        Returns:
            Logits [B, S, vocab]. A stage without the last block returns hidden states [B, S, D].

        Raises:
            ValueError: ids of a wrong shape, or ids given to a stage that has no embedding.
        """
        begins = not x.is_floating_point()
        tokens = x if begins else tokens
        if tokens is not None:
            check_tokens(tokens, self.config)
        if begins:
            if self.embed is None:
                raise ValueError(
                    "x holds token ids, but this stage has no embedding: give it the hidden states of the stage before"
                )
            x = self.dropout(self.embed(x))
        config = self.config
        cos, sin = rotary(config.seq_len, config.head_size, config.rope_base, x.device)
        mask = documents = None
        if config.eod is not None:
            if tokens is None:
                raise ValueError(f"eod={config.eod} is set, and this stage needs tokens= to tell documents apart")
            documents = documents_of(tokens, config.eod)
            mask = document_mask(documents)
        x = self.blocks(x, Context(tokens, cos=cos, sin=sin, attn_mask=mask, documents=documents))
        if self.norm is None:
            return x
        if self.head is not None:
            return self.head(self.norm(x))
        assert self.embed is not None
        return F.linear(self.norm(x), self.embed.weight)

    def active_parameters(self) -> int:
        """Number of matrix parameters that one token uses: an MoE layer counts with its router and top_k experts."""
        # An embedding that is not the head as well is in no matrix product.
        table = 0 if self.embed is None or self.config.tied else self.embed.weight.numel()
        return active_parameters(self) - table

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """FLOPs of one token's forward and backward: 6 per active parameter, plus attention.

        Args:
            seq_len: number of positions that a token attends to, without a causal mask. None, the default, is
                ``config.seq_len``.
        """
        seq_len = self.config.seq_len if seq_len is None else seq_len
        width = self.config.heads * self.config.head_size
        return 6 * self.active_parameters() + 12 * self.config.layers * width * seq_len
