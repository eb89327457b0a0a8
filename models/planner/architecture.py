"""The sizes of a model, its parameters and its FLOPs. The planner knows nothing else of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import Any

from ...moe.capacity import Capacity
from ...moe.experts.activation import ACTIVATIONS
from ..gpt import GPTConfig


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only transformer, dense or with experts.

    With ``plain=True`` it is the GPT of PTD-P: LayerNorm, biases, learned positions and GELU. Otherwise it is the
    library's `GPT`: RMSNorm, no biases, rotary positions, gated activations. A block with experts is called a mixture.

    Args:
        layers: number of blocks l.
        dim: model width D.
        heads: number of attention heads.
        kv_heads: number of heads of keys and values.
        vocab: number of tokens in the vocabulary.
        seq: number of tokens in a sequence.
        ffn: width of a dense block's feed-forward network.
        experts: number of experts E in a mixture; 0, the default, for a dense model.
        top_k: number of experts that a token picks.
        hidden: hidden width H of one expert.
        shared: number of shared experts, which every token visits; 0 by default.
        moe_every: every n-th block is a mixture. A tuple has the numbers of the mixtures, counted from 1. 0, the
            default, makes none.
        head_size: width of an attention head; 0, the default, takes dim / heads.
        windows: number of positions that attention sees in each of the first blocks, repeated for the others; 0 sees
            all. Empty by default, which means all in each block.
        qk_norm: whether queries and keys are normalised; False by default.
        attention_bias: whether attention has biases; False by default.
        tied: whether embedding and head are one matrix; True by default.
        mtp: number of further tokens that each position learns to predict (multi-token prediction), 0 by default. Each
            has a block of its own, and uses the head once more.
        gated: whether feed-forward networks have a gate projection; True by default.
        plain: whether the model has LayerNorm, biases and learned positions; False by default.
        imbalance: tokens of the busiest rank's experts over the mean; 1.0 by default.
        capacity: capacity factor, with padding, so that every expert computes the same number of rows. 0, the default,
            is dropless.
    """

    layers: int
    dim: int
    heads: int
    kv_heads: int
    vocab: int
    seq: int
    ffn: int
    experts: int = 0
    top_k: int = 0
    hidden: int = 0
    shared: int = 0
    moe_every: int | tuple[int, ...] = 0
    head_size: int = 0
    windows: tuple[int, ...] = ()
    qk_norm: bool = False
    attention_bias: bool = False
    tied: bool = True
    mtp: int = 0
    gated: bool = True
    plain: bool = False
    imbalance: float = 1.0
    capacity: float = 0.0

    def __post_init__(self) -> None:
        for name in ("layers", "dim", "heads", "kv_heads", "vocab", "seq", "ffn"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be positive; got {getattr(self, name)}")
        if not self.head_size and self.dim % self.heads:
            raise ValueError(f"--dim ({self.dim}) must be a multiple of --heads ({self.heads})")
        if self.heads % self.kv_heads:
            raise ValueError(f"--heads ({self.heads}) must be a multiple of --kv-heads ({self.kv_heads})")
        if self.experts and not 1 <= self.top_k <= self.experts:
            raise ValueError(f"--top-k ({self.top_k}) must lie between 1 and --experts ({self.experts})")
        if self.experts and self.hidden < 1:
            raise ValueError(f"--hidden, the width of an expert, must be positive; got {self.hidden}")
        if self.experts and not self.moe_blocks:
            raise ValueError(
                f"--moe-every ({self.moe_every}) must lie between 1 and --layers ({self.layers}): else no block is a "
                "mixture"
            )
        if self.shared < 0:
            raise ValueError(f"--shared must be at least 0; got {self.shared}")
        if not 1 <= self.imbalance < inf:
            raise ValueError(f"--imbalance is a largest load over the mean, and so at least 1; got {self.imbalance}")
        if not 0 <= self.capacity < inf:
            raise ValueError(f"--capacity is a factor, or 0 for dropless; got {self.capacity}")

    @classmethod
    def dense(cls, *, layers: int, dim: int, heads: int, vocab: int, seq: int, ffn: int | None = None) -> Architecture:
        """The GPT of PTD-P (arXiv:2104.04473), with a feed-forward width of 4 D unless it is given.

        >>> gpt3 = Architecture.dense(layers=96, dim=12288, heads=96, vocab=51200, seq=2048)
        >>> round(gpt3.parameters / 1e9, 1)
        174.6
        """
        sizes: dict[str, Any] = {"layers": layers, "dim": dim, "heads": heads, "kv_heads": heads, "vocab": vocab}
        return cls(**sizes, seq=seq, ffn=ffn or 4 * dim, gated=False, plain=True)

    @classmethod
    def of(cls, config: GPTConfig) -> Architecture:
        """The architecture that a `GPT` of this config has."""
        moe = bool(config.moe_layers())
        name = config.moe.get("experts", "swiglu")
        capacity = Capacity.of(config.moe.get("capacity"))
        return cls(
            layers=config.layers,
            dim=config.dim,
            heads=config.heads,
            kv_heads=config.kv_heads or config.heads,
            vocab=config.vocab,
            seq=config.seq_len,
            ffn=config.ffn,
            experts=config.num_experts if moe else 0,
            top_k=config.top_k if moe else 0,
            hidden=config.hidden if moe else 0,
            shared=config.shared_experts,
            moe_every=config.moe_every if isinstance(config.moe_every, int) else tuple(config.moe_every),
            head_size=config.head_dim or 0,
            windows=tuple(config.windows),
            qk_norm=config.qk_norm,
            attention_bias=config.attention_bias,
            tied=config.tied,
            mtp=config.mtp,
            gated=ACTIVATIONS[name].gated if isinstance(name, str) else True,
            capacity=capacity.factor if capacity and capacity.pad and isinstance(capacity.factor, float) else 0.0,
        )

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.head_size or self.dim // self.heads

    @property
    def q_dim(self) -> int:
        """Width of all queries."""
        return self.head_dim * self.heads

    @property
    def kv_dim(self) -> int:
        """Width of all keys."""
        return self.head_dim * self.kv_heads

    @property
    def matrices(self) -> int:
        """Number of matrices in a feed-forward network."""
        return 3 if self.gated else 2

    @property
    def visited(self) -> int:
        """Hidden width of all experts that a token visits, shared ones included."""
        return (self.top_k + self.shared) * self.hidden

    @cached_property
    def moe_blocks(self) -> int:
        """Number of blocks that are mixtures of experts."""
        return sum(self.is_moe(index) for index in range(self.layers))

    @property
    def load_factor(self) -> float:
        """Rows of the busiest rank's experts over an even share: the capacity factor where they are padded."""
        return self.capacity or self.imbalance

    def is_moe(self, index: int) -> bool:
        """Whether the block of this index is a mixture of experts, as `Block` decides it."""
        every, number = self.moe_every if self.experts else 0, index + 1
        return every > 0 and number % every == 0 if isinstance(every, int) else number in every

    def span(self, index: int) -> int:
        """Number of positions that attention sees in the block of this index, before the causal mask."""
        return min(self.windows[index % len(self.windows)] or self.seq, self.seq) if self.windows else self.seq

    @cached_property
    def windowed(self) -> float:
        """Share of the blocks whose attention sees a window only."""
        return sum(self.span(index) < self.seq for index in range(self.layers)) / self.layers

    @property
    def attention_matrices(self) -> int:
        """Number of parameters of the four projections of one attention."""
        return 2 * self.dim * (self.q_dim + self.kv_dim)

    @cached_property
    def attention_parameters(self) -> int:
        """Number of parameters of one block's attention and both its norms."""
        biases = self.dim + self.q_dim + 2 * self.kv_dim if self.plain or self.attention_bias else 0
        norms = (4 if self.plain else 2) * self.dim + 2 * self.head_dim * self.qk_norm
        return self.attention_matrices + biases + norms

    @cached_property
    def ffn_parameters(self) -> int:
        """Number of parameters of one dense feed-forward network."""
        return self.matrices * self.dim * self.ffn + ((self.matrices - 1) * self.ffn + self.dim if self.plain else 0)

    @cached_property
    def expert_parameters(self) -> int:
        """Number of parameters of all routed experts of one mixture."""
        return self.experts * self.matrices * self.dim * self.hidden

    @cached_property
    def router_parameters(self) -> int:
        """Number of parameters of one mixture's router and shared experts."""
        return self.dim * self.experts + self.matrices * self.dim * self.hidden * self.shared

    @cached_property
    def embedding_parameters(self) -> int:
        """Number of parameters of the embedding and of learned positions. A tied head counts here."""
        return (self.vocab + (self.seq if self.plain else 0)) * self.dim

    @property
    def head_parameters(self) -> int:
        """Number of parameters of the head, 0 if it is tied to the embedding."""
        return 0 if self.tied else self.vocab * self.dim

    @property
    def join_parameters(self) -> int:
        """Number of parameters that each further token has beside its block: norms and the joining matrix."""
        return 2 * self.dim * self.dim + 3 * self.dim

    @cached_property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        blocks = sum(self._of_block(index) for index in self.all_blocks)
        norm = self.dim * (2 if self.plain else 1)
        ends = self.embedding_parameters + self.head_parameters + norm
        return blocks + ends + self.mtp * self.join_parameters

    @property
    def all_blocks(self) -> list[int]:
        """Indices of all blocks. Blocks of further tokens are like the last one, and have its index."""
        return [*range(self.layers), *[self.layers - 1] * self.mtp]

    def _of_block(self, index: int) -> int:
        ffn = self.expert_parameters + self.router_parameters if self.is_moe(index) else self.ffn_parameters
        return self.attention_parameters + ffn

    @cached_property
    def _active_ffn(self) -> tuple[int, int]:
        """Active parameters of a dense feed-forward network, and of a mixture."""
        mixture = self.router_parameters + self.expert_parameters // max(self.experts, 1) * self.top_k
        return self.matrices * self.dim * self.ffn, mixture

    def active(self, index: int) -> int:
        """Number of parameters of a block that one token uses in matrix products, without biases."""
        return self.attention_matrices + self._active_ffn[self.is_moe(index)]

    @cached_property
    def active_parameters(self) -> int:
        """Number of parameters that one token uses, as in `GPT.active_parameters` but without biases."""
        blocks = sum(self.active(index) for index in self.all_blocks)
        return blocks + self.vocab * self.dim + self.mtp * 2 * self.dim * self.dim

    def flops(self, sequences: float, recompute: str = "none") -> float:
        """FLOPs of a step on a number of sequences. As in `GPT.flops_per_token`, attention counts without its mask.

        With recompute "none", the default, these are the FLOPs of the model, from which `mfu` is computed. With "full"
        the blocks' forward counts twice, which for the GPT of PTD-P gives its formula,
        96 B s l h^2 (1 + s / (6 h) + V / (16 l h)). With "selective" the core of attention counts twice
        (arXiv:2205.05198).
        """
        spans = sum(map(self.span, range(self.layers))) + self.mtp * self.seq
        core, head = 4 * self.q_dim * spans, 2 * self.vocab * self.dim  # forward, a token
        blocks = 2 * self.active_parameters - head + core
        head *= 1 + self.mtp
        again = {"none": 0, "selective": core, "full": blocks}[recompute]
        return sequences * self.seq * (3 * (blocks + head) + again)

    def with_load(self, imbalance: float) -> Architecture:
        """The same model with another `imbalance`."""
        return replace(self, imbalance=imbalance)
