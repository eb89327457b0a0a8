"""What the models are made of: blocks of attention and a feed-forward network, which may be a mixture of experts.

Activations are [B, S, D], sequences whole in memory (docs/explanations/models.md: why not [S, B, D]).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ..moe.experts.shared import FeedForward
from ..moe.layer import MoE
from .dropout import Dropout
from .recompute import Core

NORMS: dict[str, type[nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}  # arXiv:1910.07467, arXiv:1607.06450


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes that all models have. The defaults read bytes."""

    vocab: int = 256
    dim: int = 128  # model width D
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None  # grouped-query attention (arXiv:2305.13245); None: as many as heads
    head_dim: int | None = None  # width of one head; None: dim / heads
    qk_norm: bool = False  # queries and keys are normed, each head for itself (arXiv:2010.04245)
    hidden: int = 256  # width H of one expert; a dense block is top_k * hidden wide: equal FLOPs per token
    seq_len: int = 128  # longest sequence
    moe_every: int = 2  # every n-th block is a mixture of experts; 0: none, the dense twin
    num_experts: int = 8
    top_k: int = 2
    norm: str = "rms"  # or "layer"
    norm_eps: float | None = None  # added to the mean square or variance; None: torch's default
    dropout: float = 0.0  # of embeddings, of attention's weights, and of what a block adds to the residual stream
    moe: dict = field(default_factory=dict)  # further arguments of `MoE`, by name

    def __post_init__(self) -> None:
        kv_heads = self.kv_heads or self.heads
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(f"dim={self.dim} must be a multiple of heads={self.heads}, or head_dim be given")
        if self.heads % kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={kv_heads}")
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {self.norm!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {self.dropout}")

    @property
    def head_size(self) -> int:
        """Width of one head: `head_dim`, or dim / heads."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim


@dataclass(frozen=True, kw_only=True)
class RotaryConfig(Config):
    """Sizes of a model with rotary positions."""

    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        if self.head_dim is None and self.dim % (2 * self.heads):
            raise ValueError(f"dim={self.dim} must be a multiple of 2 * heads={2 * self.heads}: RoPE turns pairs")
        if self.head_size % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE turns pairs")
        super().__post_init__()


class Context(NamedTuple):
    """What every block of a stack is told beside x [B, S, D]."""

    tokens: Tensor | None = None  # int64 [B, S], for gates that route by them
    mask: Tensor | None = None  # bool [B, S], False = padding, which goes to no expert
    cos: Tensor | None = None  # as `rotary` gives them; None: no rotary positions
    sin: Tensor | None = None
    attn_mask: Tensor | None = None  # bool, or float to add to scores; broadcast to [B, heads, S, S]
    memory: Tensor | None = None  # [B, M, D], what cross attention reads
    memory_mask: Tensor | None = None  # as attn_mask, for [B, heads, S, M]


class Block(nn.Module):
    """Attention, then a feed-forward network, each on the normed residual stream; x [B, S, D] -> [B, S, D].

    Args:
        index: counted from 1; a mixture of experts where it is a multiple of ``config.moe_every``.
        causal: attention sees no later position.
        cross: between the two, attention to `Context.memory`.
    """

    def __init__(self, config: Config, index: int, causal: bool = False, cross: bool = False) -> None:
        super().__init__()
        self.attention_norm = norm(config)
        self.attention = Attention(config, causal)
        self.cross_norm = norm(config) if cross else None
        self.cross = Attention(config) if cross else None
        self.feed_forward_norm = norm(config)
        self.feed_forward: nn.Module
        if config.moe_every and index % config.moe_every == 0:
            self.feed_forward = MoE(config.dim, config.hidden, config.num_experts, config.top_k, **config.moe)
        else:
            self.feed_forward = FeedForward(config.dim, config.top_k * config.hidden)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        tokens, mask, cos, sin, attn_mask, memory, memory_mask = context
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin, mask=attn_mask))
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.dropout(self.cross(self.cross_norm(x), memory=memory, mask=memory_mask))
        routed = {"ids": tokens, "mask": mask} if isinstance(self.feed_forward, MoE) else {}
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x), **routed))


class Attention(nn.Module):
    """Multi-head attention (arXiv:1706.03762), with fewer heads for keys and values if the config says so.

    Of x to itself, all of it or, if `causal`, what is not later; or to a memory. A mask says who attends to whom
    beside that: causal attention takes none.
    """

    def __init__(self, config: Config, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.causal = config.heads, config.kv_heads or config.heads, causal
        self.size = size = config.head_size
        self.query = nn.Linear(config.dim, self.heads * size, bias=False)
        self.key = nn.Linear(config.dim, self.kv_heads * size, bias=False)
        self.value = nn.Linear(config.dim, self.kv_heads * size, bias=False)
        self.out = nn.Linear(self.heads * size, config.dim, bias=False)
        self.query_norm = norm(config, size) if config.qk_norm else None
        self.key_norm = norm(config, size) if config.qk_norm else None
        self.core = Core(config.dropout)
        for linear in (self.query, self.key, self.value):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.normal_(self.out.weight, std=0.02 / math.sqrt(2 * config.layers))  # GPT-2: the residual adds up

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """x [B, S, D] -> [B, S, D]; the rest as in `Context`, where mask is attn_mask or memory_mask."""
        read = x if memory is None else memory
        # by size: the heads that are here may be a part of all (`tensor_parallel`)
        q = rearrange(self.query(x), "b s (h d) -> b h s d", d=self.size)
        k = rearrange(self.key(read), "b s (h d) -> b h s d", d=self.size)
        v = rearrange(self.value(read), "b s (h d) -> b h s d", d=self.size)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = self.core(q, k, v, causal=self.causal, grouped=self.kv_heads != self.heads, mask=mask)
        return self.out(rearrange(y, "b h s d -> b s (h d)"))


def norm(config: Config, size: int | None = None) -> nn.Module:
    """The norm that a config names, over the last axis; its size is D, or another."""
    options = {} if config.norm_eps is None else {"eps": config.norm_eps}
    return NORMS[config.norm](config.dim if size is None else size, **options)


def check_tokens(tokens: Tensor, config: Config, mask: Tensor | None = None) -> None:
    """ValueError if token ids are not [B, S] with S <= seq_len, or the mask of padding does not fit them."""
    if tokens.ndim != 2 or tokens.shape[1] > config.seq_len:
        raise ValueError(f"tokens must be [B, S] with S <= seq_len={config.seq_len}; got {tuple(tokens.shape)}")
    if mask is not None and (mask.shape != tokens.shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {tuple(tokens.shape)}; got {mask.dtype} {tuple(mask.shape)}")


def rotary(length: int, size: int, base: float = 10_000.0, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, size / 2] of the angles by which position and pair turn (RoPE, arXiv:2104.09864).

    float32. Models compute them in each forward: as buffers they would be undefined after `to_empty`, and rounded by
    ``.to(bfloat16)``.
    """
    speed = base ** (-torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), speed)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + size/2]) of x [..., S, size] by its position's angle, in float32 or wider."""
    cos, sin = cos[: x.shape[-2]], sin[: x.shape[-2]]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def active_parameters(module: nn.Module) -> int:
    """Parameters of a module that a token meets in matrix products: of `MoE` layers top_k experts, and the router."""
    count = sum(p.numel() for p in module.parameters() if p.ndim > 1)
    for layer in module.modules():
        if isinstance(layer, MoE):
            each = sum(p.numel() for p in layer.experts.parameters()) // layer.num_experts
            count -= each * (layer.num_experts - layer.top_k)
    return count
