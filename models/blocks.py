"""Transformer blocks that GPT, BERT and T5 share: attention, then a dense or an MoE feed-forward network.

Activations are [B, S, D]. Why not [S, B, D]: docs/explanations/models.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ..moe.experts.shared import FeedForward, Residual
from ..moe.layer import MoE, moe_layers
from .dropout import Dropout
from .recompute import Core

NORMS: dict[str, type[nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes that all models have. The defaults fit text that is read as bytes.

    Args:
        vocab: number of token ids.
        dim: model width D, a multiple of `heads`.
        layers: number of blocks.
        heads: number of attention heads, a multiple of `kv_heads`.
        kv_heads: number of heads for keys and values, for grouped-query attention (arXiv:2305.13245). None, the
            default, is as many as `heads`.
        head_dim: width of one head. None, the default, is dim / heads.
        qk_norm: whether queries and keys are normalised, each head for itself (arXiv:2010.04245); False by default.
        hidden: hidden width H of one expert. A dense block is as wide as all experts of a token: equal FLOPs per token.
        seq_len: number of tokens in the longest sequence.
        moe_every: every n-th block has an MoE layer, or with a sequence of numbers the blocks of these numbers, from 1:
            ``range(4, 62)`` leaves the first 3 of 61 blocks dense. 0 makes all blocks dense.
        num_experts: number of experts E in each MoE layer, on all ranks together.
        top_k: number of experts k that a token picks.
        attention_bias: whether queries, keys, values and the output of attention have biases; False by default.
        norm: ``"rms"`` (RMSNorm, arXiv:1910.07467) or ``"layer"`` (LayerNorm, arXiv:1607.06450).
        norm_eps: number that the norm adds to the mean square or variance. None, the default, is torch's.
        dropout: probability, in [0, 1), for embeddings, attention weights, and the output of each attention and
            feed-forward network.
        moe: further arguments of `MoE`, by name.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    vocab: int = 256
    dim: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    hidden: int = 256
    seq_len: int = 128
    moe_every: int | Sequence[int] = 2
    num_experts: int = 8
    top_k: int = 2
    attention_bias: bool = False
    norm: str = "rms"
    norm_eps: float | None = None
    dropout: float = 0.0
    moe: dict = field(default_factory=dict)

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
        if not isinstance(self.moe_every, int):
            object.__setattr__(self, "moe_every", tuple(self.moe_every))
            if wrong := [n for n in self.moe_every if not isinstance(n, int) or n < 1]:
                raise ValueError(f"moe_every must be 0 or more, or numbers of blocks from 1; got {wrong[0]!r} in it")
            last = max(self.layers, getattr(self, "decoder_layers", None) or 0)
            if max(self.moe_every, default=0) > last:
                raise ValueError(f"moe_every has the block {max(self.moe_every)}, but the last one is {last}")
        elif self.moe_every < 0:
            raise ValueError(f"moe_every must be 0 or more, or numbers of blocks from 1; got {self.moe_every}")

    def has_experts(self, index: int) -> bool:
        """Whether a block, counted from 0, has an MoE layer: the rule of `moe_every`."""
        every, number = self.moe_every, index + 1
        return every > 0 and number % every == 0 if isinstance(every, int) else number in every

    def moe_layers(self) -> list[str]:
        """Names of all MoE layers of the model, in their order."""
        return [f"blocks.{index}.feed_forward" for index in range(self.layers) if self.has_experts(index)]

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the whole model."""
        return self.layers

    @property
    def shared_experts(self) -> int:
        """Number of shared experts in each MoE layer; 0 if a module replaces them."""
        shared = self.moe.get("shared", 0)
        number = shared.shared if isinstance(shared, Residual) else shared
        return number if isinstance(number, int) else 0

    @property
    def ffn(self) -> int:
        """Hidden width of a dense block: of the top_k experts of a token and the shared ones together."""
        return (self.top_k + self.shared_experts) * self.hidden

    @property
    def head_size(self) -> int:
        """Width of one head: `head_dim`, or dim / heads."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim


@dataclass(frozen=True, kw_only=True)
class RotaryConfig(Config):
    """Sizes of a model with rotary position embeddings (RoPE, arXiv:2104.09864).

    Args:
        rope_base: base of the angles, 10,000 by default. A larger one suits longer sequences.
    """

    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        if self.head_dim is None and self.dim % (2 * self.heads):
            raise ValueError(f"dim={self.dim} must be a multiple of 2 * heads={2 * self.heads}: RoPE rotates pairs")
        if self.head_size % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")
        super().__post_init__()


Hidden = tuple[Tensor, ...]  # hidden states between pipeline stages, each [B, S, D]


class Context(NamedTuple):
    """Inputs of every block beside x [B, S, D]."""

    tokens: Tensor | None = None  # int64 [B, S]: token ids, for gates that route by them
    mask: Tensor | None = None  # bool [B, S], False = padding, which goes to no expert
    cos: Tensor | None = None  # cos and sin of `rotary`; None: no rotary positions
    sin: Tensor | None = None
    attn_mask: Tensor | None = None  # bool, or float to add to scores; broadcast to [B, heads, S, S]
    memory: Tensor | None = None  # [B, M, D]: the encoder's output, for cross attention
    memory_mask: Tensor | None = None  # as attn_mask, for [B, heads, S, M]
    documents: Tensor | None = None  # int64 [B, S]: number of each token's document, for balance losses


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a dense or an MoE feed-forward network.

    Args:
        config: sizes.
        index: number of the block, from 0. ``config.has_experts(index)`` says whether it has an MoE layer.
        causal: whether attention sees no later position; False by default.
        cross: whether the block also attends to `Context.memory`, between the two; False by default.
        window: number of positions that a token of a causal block attends to, itself included. 0, the default: all.
    """

    def __init__(self, config: Config, index: int, causal: bool = False, cross: bool = False, window: int = 0) -> None:
        super().__init__()
        self.attention_norm = norm(config)
        self.attention = Attention(config, causal, window)
        self.cross_norm = norm(config) if cross else None
        self.cross = Attention(config) if cross else None
        self.feed_forward_norm = norm(config)
        self.feed_forward: nn.Module
        if config.has_experts(index):
            self.feed_forward = MoE(config.dim, config.hidden, config.num_experts, config.top_k, **config.moe)
        else:
            self.feed_forward = FeedForward(config.dim, config.ffn)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Hidden states x [B, S, D] -> [B, S, D]."""
        tokens, mask, cos, sin, attn_mask, memory, memory_mask, documents = context
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin, mask=attn_mask))
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.dropout(self.cross(self.cross_norm(x), memory=memory, mask=memory_mask))
        routed = {"ids": tokens, "mask": mask, "documents": documents} if isinstance(self.feed_forward, MoE) else {}
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x), **routed))


class Attention(nn.Module):
    """Multi-head attention (arXiv:1706.03762), grouped-query where ``config.kv_heads`` is less than ``config.heads``.

    Queries come from x, keys and values from x too, or from a memory. If `causal`, no token attends to a later one;
    a mask that is given takes the place of that, and must be causal itself. With a `window` as well, a token attends to
    itself and the window - 1 tokens before.
    """

    def __init__(self, config: Config, causal: bool = False, window: int = 0) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.causal = config.heads, config.kv_heads or config.heads, causal
        self.window = window
        self.size, bias = config.head_size, config.attention_bias
        size = self.size
        self.query = nn.Linear(config.dim, self.heads * size, bias=bias)
        self.key = nn.Linear(config.dim, self.kv_heads * size, bias=bias)
        self.value = nn.Linear(config.dim, self.kv_heads * size, bias=bias)
        self.out = nn.Linear(self.heads * size, config.dim, bias=bias)
        self.query_norm = norm(config, size) if config.qk_norm else None
        self.key_norm = norm(config, size) if config.qk_norm else None
        self.core: nn.Module = Core(config.dropout)
        for linear in (self.query, self.key, self.value):
            nn.init.normal_(linear.weight, std=0.02)
            if bias:
                nn.init.zeros_(linear.bias)
        # as GPT-2: each block adds to the residual stream twice, and its variance must not grow with depth
        nn.init.normal_(self.out.weight, std=0.02 / math.sqrt(2 * config.layers))
        if bias:
            nn.init.zeros_(self.out.bias)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """Hidden states x [B, S, D] -> [B, S, D]; the others as in `Context`, with one of its two masks as `mask`."""
        read = x if memory is None else memory
        # split by the size of a head: with `tensor_parallel` this rank has only some of the heads
        q = rearrange(self.query(x), "b s (h d) -> b h s d", d=self.size)
        k = rearrange(self.key(read), "b s (h d) -> b h s d", d=self.size)
        v = rearrange(self.value(read), "b s (h d) -> b h s d", d=self.size)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        causal, grouped = self.causal and mask is None, self.kv_heads != self.heads
        y = self.core(q, k, v, causal=causal, grouped=grouped, mask=mask, window=self.window)
        return self.out(rearrange(y, "b h s d -> b s (h d)"))


def norm(config: Config, size: int | None = None) -> nn.Module:
    """The norm that a config names, over the last axis; its size is D, or another."""
    options = {} if config.norm_eps is None else {"eps": config.norm_eps}
    return NORMS[config.norm](config.dim if size is None else size, **options)


def block_numbers(text: str) -> tuple[int, ...]:
    """Numbers in a list with commas, and with a hyphen for all in between.

    Raises:
        ValueError: the text is no such list.

    >>> block_numbers("2,5-7")
    (2, 5, 6, 7)
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise ValueError(f"a list of numbers is written as in 2,5-7; got {text!r}")
        if last and int(last) < int(first):
            raise ValueError(f"a range goes from the smaller number to the larger, as in 5-7; got {part.strip()!r}")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def check_tokens(tokens: Tensor, config: Config, mask: Tensor | None = None) -> None:
    """Raise a ValueError unless ids are int64 [B, S] with S <= seq_len, and the padding mask fits them."""
    if tokens.ndim != 2 or tokens.shape[1] > config.seq_len:
        raise ValueError(f"tokens must be [B, S] with S <= seq_len={config.seq_len}; got {tuple(tokens.shape)}")
    if tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be int64; got {tokens.dtype}")
    if mask is not None and (mask.shape != tokens.shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {tuple(tokens.shape)}; got {mask.dtype} {tuple(mask.shape)}")


def check_hidden(hidden: Hidden, number: int) -> None:
    """Raise a ValueError unless a model, or a pipeline stage of one, got as many hidden states as it begins with."""
    if len(hidden) != number:
        raise ValueError(
            f"hidden must have {number} tensors here, as the pipeline stage before returns them; got {len(hidden)}"
        )


def rotary(length: int, size: int, base: float = 10_000.0, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE's angles (arXiv:2104.09864), each float32 [length, size / 2].

    Models compute them in each forward. Buffers would be undefined after `to_empty`, and ``.to(bfloat16)`` would round
    them.
    """
    speed = base ** (-torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), speed)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + size/2]) of x [..., S, size] by its position's angle, in float32 or wider."""
    cos, sin = cos[: x.shape[-2]], sin[: x.shape[-2]]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def active_parameters(module: nn.Module) -> int:
    """Number of matrix parameters that one token uses: an `MoE` layer counts with its router and top_k experts."""
    layers = moe_layers(module).values()
    stacked = {p for layer in layers for p in layer.experts.parameters()}
    count = sum(p.numel() for p in module.parameters() if p.ndim > 1 and p not in stacked)
    for layer in layers:  # experts' tensors are stacked: their biases have two axes
        matrices = sum(p.numel() for p in layer.experts.parameters() if p.ndim > 2)
        count += matrices // layer.num_experts * layer.top_k
    return count
