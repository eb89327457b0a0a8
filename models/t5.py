"""T5 (arXiv:1910.10683): an encoder-decoder from text to text, with MoE layers as in Switch (arXiv:2101.03961)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .blocks import Block, Config, Context, Hidden, active_parameters, check_hidden, check_tokens, norm
from .dropout import Dropout, Part
from .recompute import Blocks


@dataclass(frozen=True, kw_only=True)
class T5Config(Config):
    """Sizes of a `T5`. The defaults fit 256 bytes, a start token, and 63 sentinels that stand for removed spans.

    The arguments are the fields of `turnout.models.blocks.Config`, and these:

    Args:
        layers: number of blocks of the encoder.
        decoder_layers: number of blocks of the decoder. None, the default, is as many.
        start: id that the decoder reads first. Ids below it are text, ids above it are sentinels.
        buckets: number of buckets of relative positions, an even number of 4 or more. Each has a bias per head.
        max_distance: distance from which on all positions share one bucket; more than half of `buckets`.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    vocab: int = 320
    layers: int = 2
    decoder_layers: int | None = None
    start: int = 256
    buckets: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.start < self.vocab:
            raise ValueError(f"start={self.start} must lie between 1 and vocab - 1 = {self.vocab - 1}")
        if self.buckets < 4 or self.buckets % 2 or self.max_distance <= self.buckets // 2:
            raise ValueError(
                "buckets must be an even number of 4 or more, and max_distance more than half of it; "
                f"got {self.buckets} and {self.max_distance}"
            )

    def moe_layers(self) -> list[str]:
        """Names of all MoE layers of the model: the encoder's, then the decoder's."""
        stacks = {"encoder": self.layers, "decoder": self.num_blocks - self.layers}
        return [f"{name}.{i}.feed_forward" for name, n in stacks.items() for i in range(n) if self.has_experts(i)]

    @property
    def num_blocks(self) -> int:
        """Number of blocks of encoder and decoder together."""
        return self.layers + (self.layers if self.decoder_layers is None else self.decoder_layers)


class T5(nn.Module):
    """Encoder-decoder: pre-norm blocks, relative positions, cross attention in the decoder, tied embeddings.

    Self-attention adds a learned bias per head and bucket of distances. The encoder has one table of biases, the
    decoder another. Cross attention has none. ``config.moe_every`` says which blocks of both have an MoE layer. Unlike
    the original, attention scores are divided by sqrt(D / heads). The same `torch.manual_seed` gives the same model at
    every world size.

    Args:
        config: sizes of the whole model.
        kept: range of blocks that this pipeline stage holds. They are counted from 0, the encoder's and then the
            decoder's. None, the default, is all of them. The first block of each stack comes with the embedding, and
            the last one with the norm. The decoder's last has the embedding as well, which is the head. Blocks of a
            stack come with its table of biases. Parts that are not kept are None, so names and initial values stay as
            in the whole model.

    References:
        Raffel et al., T5, arXiv:1910.10683. Fedus et al., Switch Transformers, arXiv:2101.03961.

    >>> model = T5(T5Config(dim=32, layers=2, heads=2, hidden=16, num_experts=4, seq_len=16))
    >>> source, target = torch.zeros(3, 12, dtype=torch.int64), torch.full((3, 5), model.config.start)
    >>> model(source, target).shape
    torch.Size([3, 5, 320])
    """

    def __init__(self, config: T5Config, kept: range | None = None) -> None:
        super().__init__()
        self.config = config
        layers, number = config.layers, config.num_blocks
        kept = range(number) if kept is None else kept
        in_decoder = range(kept.start - layers, kept.stop - layers)  # of the blocks, the decoder's counted from 0
        embed = nn.Embedding(config.vocab, config.dim)
        self.embed = embed if {0, layers, number - 1} & {*kept} else None
        self.dropout = Dropout(config.dropout)
        bias = RelativeBias(config, causal=False)  # kept or not, it draws its random numbers, as the blocks do
        self.encoder_bias = bias if kept.start < layers else None
        self.encoder = Blocks.of((Block(config, index) for index in range(layers)), kept)
        self.encoder_norm = norm(config) if layers - 1 in kept else None
        self.encoder_dropout = Dropout(config.dropout)
        bias = RelativeBias(config, causal=True)
        self.decoder_bias = bias if kept.stop > layers else None
        blocks = (Block(config, index, cross=True) for index in range(number - layers))
        self.decoder = Blocks.of(blocks, in_decoder)
        self.decoder_norm = norm(config) if number - 1 in kept else None
        self.decoder_dropout = Dropout(config.dropout)
        nn.init.normal_(embed.weight, std=0.02)

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        hidden: Hidden = (),
    ) -> Tensor | Hidden:
        """Compute the logits of the token after each target token.

        A pipeline stage gets the same tokens and masks as the whole model.

        Args:
            source: token ids that the encoder reads, int64 [B, M], with M at most ``config.seq_len``.
            target: token ids that the decoder reads, int64 [B, S], with S at most ``config.seq_len``.
            mask: bool [B, M], False = padding of the source: no token attends to it, and it goes to no expert. None,
                the default, has no padding.
            target_mask: bool [B, S], False = padding of the target, which goes to no expert. It must come last, where
                the causal mask hides it.
            hidden: what the stage before returned, for a later pipeline stage; () by default.

        Returns:
            Logits [B, S, vocab]. Stages without the last block return a tuple. If its last block is the encoder's, it
            has the hidden states [B, M, D]. Else it has the hidden states [B, S, D], then the memory [B, M, D].

        Raises:
            ValueError: ids or masks of a wrong shape or dtype, or hidden states that a stage lacks.
        """
        reads_one = self.encoder_bias is not None or self.decoder[0] is not None
        check_hidden(hidden, 0 if self.encoder[0] is not None else 1 if reads_one else 2)
        if self.encoder_bias is not None:
            hidden = (self.encode(source, mask, *hidden),)
        if self.decoder_bias is not None:
            *x, memory = hidden
            hidden = (self.decode(target, memory, mask, target_mask, *x), memory)
        if self.decoder_norm is not None:
            return hidden[0]
        return tuple(x.clone() for x in hidden)  # FSDP2 puts hooks on them, so the memory must not be a view

    def check_inputs(
        self, source: Tensor, target: Tensor, mask: Tensor | None = None, target_mask: Tensor | None = None
    ) -> None:
        """Raise a ValueError for inputs that do not fit. A pipeline calls it on every rank before any waits."""
        check_tokens(source, self.config, mask)
        check_tokens(target, self.config, target_mask)

    def encode(self, source: Tensor, mask: Tensor | None = None, x: Tensor | None = None) -> Tensor:
        """Encode source ids, int64 [B, M], to the memory [B, M, D]. Generation needs it once per text.

        With `tensor_parallel`, the result is this rank's part of the memory, [B, M / tp, D]. A later pipeline stage
        continues from the hidden states x [B, M, D]. Without the encoder's last block it returns hidden states again.
        """
        check_tokens(source, self.config, mask)
        assert self.encoder_bias is not None
        bias = self.encoder_bias(source.shape[1])
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None, :], -torch.inf)
        y = self.encoder(self._embedded(source) if x is None else x, Context(source, mask, attn_mask=bias))
        return y if self.encoder_norm is None else self.encoder_dropout(self.encoder_norm(y))

    def decode(
        self,
        target: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """Decode target ids, int64 [B, S], to logits [B, S, vocab]; `memory` [B, M, D] is the result of `encode`.

        A later pipeline stage continues from the hidden states x [B, S, D]. Without the last block it returns hidden
        states again.
        """
        check_tokens(target, self.config, target_mask)
        assert self.decoder_bias is not None
        memory_mask = None if mask is None else mask[:, None, None, :]
        context = Context(
            target,
            target_mask,
            attn_mask=self.decoder_bias(target.shape[1]),
            memory=memory,
            memory_mask=memory_mask,
        )
        y = self.decoder(self._embedded(target) if x is None else x, context)
        if self.decoder_norm is None or self.embed is None:
            return y
        return F.linear(self.decoder_dropout(self.decoder_norm(y)), self.embed.weight)

    def _embedded(self, tokens: Tensor) -> Tensor:
        assert self.embed is not None
        return self.dropout(self.embed(tokens))

    def active_parameters(self) -> int:
        """Number of matrix parameters that one token uses: an MoE layer counts with its router and top_k experts."""
        return active_parameters(self)

    def flops(self, source: int, target: int) -> int:
        """FLOPs of the forward and backward of one text: 6 per active parameter and token, plus attention.

        Args:
            source: number of tokens that the encoder reads.
            target: number of tokens that the decoder reads. The keys and values of its cross attention are those of
                the source.
        """
        return sum(self.block_flops(source, target))

    def block_flops(self, source: int, target: int) -> list[int]:
        """FLOPs of each block, the encoder's and then the decoder's; see `flops`. The last one includes the head."""
        config = self.config
        width = 12 * config.heads * config.head_size
        costs = [6 * active_parameters(block) * source + width * source**2 for block in self.encoder]
        for block in self.decoder:
            read = sum(p.numel() for p in _cross(block))  # matrices that the source runs through
            matrices = (active_parameters(block) - read) * target + read * source
            costs.append(6 * matrices + width * target * (target + source))
        costs[-1] += 6 * config.vocab * config.dim * target
        return costs


class RelativeBias(nn.Module):
    """Relative position bias: a learned number per head and bucket of distances (arXiv:1910.10683, section 2.1).

    Attributes:
        part: part of the heads that it computes; `context_parallel` sets it.
    """

    part: Part = Part()

    def __init__(self, config: T5Config, causal: bool) -> None:
        super().__init__()
        self.causal, self.max_distance = causal, config.max_distance
        self.weight = nn.Parameter(torch.empty(config.buckets, config.heads))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, length: int) -> Tensor:
        """Biases [1, heads, S, S] of attention scores, for S = `length` positions; -inf for later ones if causal."""
        position = torch.arange(length, device=self.weight.device)
        distance = position - position[:, None]  # of a key (column) from a query (row)
        weight = self.weight.chunk(self.part.number, dim=1)[self.part.place]
        bias = weight[bucket(distance, len(weight), self.max_distance, self.causal)]
        if self.causal:
            bias = bias.masked_fill((distance > 0).unsqueeze(-1), -torch.inf)
        return rearrange(bias, "query key heads -> 1 heads query key")


def _cross(block: nn.Module) -> list[Tensor]:
    """Matrices of the keys and values of a block's cross attention."""
    assert isinstance(block, Block)
    assert block.cross is not None
    return [block.cross.key.weight, block.cross.value.weight]


def bucket(distance: Tensor, buckets: int, max_distance: int, causal: bool) -> Tensor:
    """Bucket of each distance between a key and its query.

    Half of the buckets hold one distance each. The others grow with the logarithm of the distance. If not causal, keys
    before the query use half of all buckets, keys after it the other half.

    Args:
        distance: position of the key minus position of the query, int64 of any shape.
        buckets: number of buckets.
        max_distance: distance from which on all are in the last bucket.
        causal: whether no query attends to a later key. Later keys are then in bucket 0.

    Returns:
        Buckets in [0, buckets), int64, of the same shape.

    >>> bucket(torch.tensor([0, -1, -7, -8, -127, -500, 3]), buckets=16, max_distance=128, causal=True).tolist()
    [0, 1, 7, 8, 15, 15, 0]
    """
    first = torch.zeros_like(distance)
    if not causal:
        buckets //= 2
        first = buckets * (distance > 0).long()
        distance = -distance.abs()
    away, exact = (-distance).clamp(min=0), buckets // 2
    share = (away.clamp(min=1).double() / exact).log() / math.log(max_distance / exact)
    far = exact + (share * (buckets - exact)).long()
    return first + torch.where(away < exact, away, far.clamp(max=buckets - 1))
