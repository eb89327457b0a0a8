"""A decoder-only transformer whose feed-forward blocks may be mixtures of experts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..moe.layer import MoE
from ..moe.shared import FeedForward
from .recompute import Blocks, Core


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes of a `GPT`. The defaults read bytes."""

    vocab: int = 256
    dim: int = 128  # model width D
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None  # grouped-query attention (arXiv:2305.13245); None: as many as heads
    hidden: int = 256  # width H of one expert; a dense block is top_k * hidden wide: equal FLOPs per token
    seq_len: int = 128  # longest sequence
    moe_every: int = 2  # every n-th block is a mixture of experts; 0: none, the dense twin
    num_experts: int = 8
    top_k: int = 2
    rope_base: float = 10_000.0
    moe: dict[str, Any] = field(default_factory=dict)  # further arguments of `MoE`

    def __post_init__(self) -> None:
        kv_heads = self.kv_heads or self.heads
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim={self.dim} must be a multiple of 2 * heads={2 * self.heads}: RoPE turns pairs")
        if self.heads % kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={kv_heads}")


class GPT(nn.Module):
    """Pre-norm blocks (RMSNorm, arXiv:1910.07467), rotary positions, fused causal attention, tied embeddings.

    Block i (from 1) is a mixture of experts where i is a multiple of `moe_every`. Built under one
    `torch.manual_seed`, it is the same model at every world size.

    Args:
        config: the sizes of the whole model.
        kept: the blocks, counted from 0, that this one holds as a stage of a pipeline; None: all of them. The first
            block comes with the embedding, the last with the norm and the head, which is the embedding again. The
            rest is None, so that names and initial values are those of the whole model.
    """

    def __init__(self, config: GPTConfig, kept: range | None = None) -> None:
        super().__init__()
        self.config = config
        kept = range(config.layers) if kept is None else kept
        first, last = 0 in kept, config.layers - 1 in kept
        embed = nn.Embedding(config.vocab, config.dim)
        self.embed = embed if first or last else None
        self.blocks = Blocks()
        for index in range(config.layers):
            block = Block(config, index + 1)  # dropped at once if not kept, having drawn its random numbers
            self.blocks.add_module(str(index), block if index in kept else None)
        self.norm = nn.RMSNorm(config.dim) if last else None
        cos, sin = rotary(config.seq_len, config.dim // config.heads, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        nn.init.normal_(embed.weight, std=0.02)

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Token ids int64 [B, S] -> logits [B, S, vocab] of each next token; S is at most `seq_len`.

        A stage that does not begin with the first block is given the hidden states [B, S, D] of the stage before it,
        and the ids as `tokens`; one that does not end with the last block returns hidden states.
        """
        begins = not x.is_floating_point()
        tokens = x if begins else tokens
        if tokens is not None and (tokens.ndim != 2 or tokens.shape[1] > self.config.seq_len):
            raise ValueError(
                f"tokens must be [B, S] with S <= seq_len={self.config.seq_len}; got {tuple(tokens.shape)}"
            )
        if begins:
            if self.embed is None:
                raise ValueError("this stage has no embedding: give it the hidden states of the stage before it")
            x = self.embed(x)
        x = self.blocks(x, self.cos, self.sin, tokens)
        if self.norm is None or self.embed is None:
            return x
        return F.linear(self.norm(x), self.embed.weight)

    def active_parameters(self) -> int:
        """Parameters a token meets in matrix products: of an MoE block top_k experts, and the router."""
        return active_parameters(self)

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """Forward and backward: 6 per active parameter, and attention over `seq_len` positions unmasked."""
        seq_len = self.config.seq_len if seq_len is None else seq_len
        return 6 * self.active_parameters() + 12 * self.config.layers * self.config.dim * seq_len


def active_parameters(module: nn.Module) -> int:
    """Parameters of a module that a token meets in matrix products: of `MoE` layers top_k experts, and the router."""
    count = sum(p.numel() for p in module.parameters() if p.ndim > 1)
    for layer in module.modules():
        if isinstance(layer, MoE):
            each = sum(p.numel() for p in layer.experts.parameters()) // layer.num_experts
            count -= each * (layer.num_experts - layer.top_k)
    return count


class Block(nn.Module):
    """Attention, then a feed-forward network, each on the normed residual stream; x [B, S, D] -> [B, S, D]."""

    def __init__(self, config: GPTConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.dim)
        self.feed_forward: nn.Module
        if config.moe_every and index % config.moe_every == 0:
            self.feed_forward = MoE(config.dim, config.hidden, config.num_experts, config.top_k, **config.moe)
        else:
            self.feed_forward = FeedForward(config.dim, config.top_k * config.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, tokens: Tensor | None = None) -> Tensor:
        """x [B, S, D]; cos and sin as `rotary` gives them; tokens int64 [B, S], for gates that route by them."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        ids = {"ids": tokens} if isinstance(self.feed_forward, MoE) else {}
        return x + self.feed_forward(self.feed_forward_norm(x), **ids)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; x [B, S, D] -> [B, S, D]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.size = size = config.dim // config.heads
        self.query = nn.Linear(config.dim, self.heads * size, bias=False)
        self.key = nn.Linear(config.dim, self.kv_heads * size, bias=False)
        self.value = nn.Linear(config.dim, self.kv_heads * size, bias=False)
        self.out = nn.Linear(self.heads * size, config.dim, bias=False)
        self.core = Core()
        for linear in (self.query, self.key, self.value):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.normal_(self.out.weight, std=0.02 / math.sqrt(2 * config.layers))  # GPT-2: the residual adds up

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, D]; cos and sin as `rotary` gives them."""
        # by size: the heads that are here may be a part of all (`tensor_parallel`)
        q = rotate(rearrange(self.query(x), "b s (h d) -> b h s d", d=self.size), cos, sin)
        k = rotate(rearrange(self.key(x), "b s (h d) -> b h s d", d=self.size), cos, sin)
        v = rearrange(self.value(x), "b s (h d) -> b h s d", d=self.size)
        y = self.core(q, k, v, causal=True, grouped=self.kv_heads != self.heads)
        return self.out(rearrange(y, "b h s d -> b s (h d)"))


def rotary(length: int, size: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, size / 2] of the angles by which position and pair turn (RoPE, arXiv:2104.09864)."""
    speed = base ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), speed)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + size/2]) of x [..., S, size] by its position's angle, in float32 or wider."""
    cos, sin = cos[: x.shape[-2]], sin[: x.shape[-2]]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)
