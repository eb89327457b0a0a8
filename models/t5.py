"""An encoder and a decoder: text to text (T5, arXiv:1910.10683), its experts as in Switch (arXiv:2101.03961)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .blocks import Block, Config, Context, active_parameters, check_tokens, norm
from .dropout import Dropout
from .recompute import Blocks


@dataclass(frozen=True, kw_only=True)
class T5Config(Config):
    """Sizes of a `T5`. The defaults read bytes: 256 of them, `start`, and 63 sentinels that stand for cut-out spans."""

    vocab: int = 320
    layers: int = 2  # of the encoder
    decoder_layers: int | None = None  # None: as many
    start: int = 256  # what the decoder reads first; ids below are text, those above sentinels, from the last one down
    buckets: int = 32  # of relative positions, that have a bias each
    max_distance: int = 128  # from which on all distances share one

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.start < self.vocab:
            raise ValueError(f"start={self.start} must lie between 1 and vocab - 1 = {self.vocab - 1}")
        if self.buckets < 4 or self.buckets % 2 or self.max_distance <= self.buckets // 2:
            raise ValueError(
                "buckets must be an even number of 4 or more, and max_distance more than half of it; "
                f"got {self.buckets} and {self.max_distance}"
            )


class T5(nn.Module):
    """Pre-norm blocks with relative positions; the decoder's attend to the encoder's output; tied embeddings.

    Positions are T5's: a bias on the scores of attention to itself, learned for each head and bucket of distances, one
    table for the encoder and one for the decoder. Attention to the encoder has none. Every `moe_every`-th block of
    both is a mixture of experts, as in Switch Transformer. Unlike T5's, scores are divided by sqrt(D / heads), which
    the original leaves to its initial values. Built under one `torch.manual_seed`, it is the same model at every
    world size.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        decoder_layers = config.layers if config.decoder_layers is None else config.decoder_layers
        self.embed = nn.Embedding(config.vocab, config.dim)
        self.dropout = Dropout(config.dropout)
        self.encoder_bias = RelativeBias(config, causal=False)
        self.encoder = Blocks(Block(config, index + 1) for index in range(config.layers))
        self.encoder_norm = norm(config)
        self.decoder_bias = RelativeBias(config, causal=True)
        self.decoder = Blocks(Block(config, index + 1, cross=True) for index in range(decoder_layers))
        self.decoder_norm = norm(config)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(
        self, source: Tensor, target: Tensor, mask: Tensor | None = None, target_mask: Tensor | None = None
    ) -> Tensor:
        """Token ids int64, source [B, M] and target [B, S] -> logits [B, S, vocab] of what follows each of target.

        M and S are at most `seq_len`. `mask` and `target_mask` of the same shapes, bool, False = padding: it goes to
        no expert, and no token attends to that of the source. Padding of the target comes last, where the causal mask
        hides it.
        """
        return self.decode(target, self.encode(source, mask), mask, target_mask)

    def encode(self, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """Source ids [B, M] -> the memory [B, M, D] that the decoder reads; once for a text, if it is generated."""
        check_tokens(source, self.config, mask)
        bias = self.encoder_bias(source.shape[1])
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None, :], -torch.inf)
        x = self.encoder(self.dropout(self.embed(source)), Context(source, mask, attn_mask=bias))
        return self.dropout(self.encoder_norm(x))

    def decode(
        self, target: Tensor, memory: Tensor, mask: Tensor | None = None, target_mask: Tensor | None = None
    ) -> Tensor:
        """Target ids [B, S] and memory [B, M, D] -> logits [B, S, vocab]; masks as in `forward`."""
        check_tokens(target, self.config, target_mask)
        memory_mask = None if mask is None else mask[:, None, None, :]
        context = Context(
            target,
            target_mask,
            attn_mask=self.decoder_bias(target.shape[1]),
            memory=memory,
            memory_mask=memory_mask,
        )
        x = self.decoder(self.dropout(self.embed(target)), context)
        return F.linear(self.dropout(self.decoder_norm(x)), self.embed.weight)

    def active_parameters(self) -> int:
        """Parameters a token meets in matrix products: of an MoE block top_k experts, and the router."""
        return active_parameters(self)


class RelativeBias(nn.Module):
    """A bias for each head and distance, to be added to attention's scores (arXiv:1910.10683, section 2.1)."""

    def __init__(self, config: T5Config, causal: bool) -> None:
        super().__init__()
        self.causal, self.max_distance = causal, config.max_distance
        self.weight = nn.Parameter(torch.empty(config.buckets, config.heads))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, length: int) -> Tensor:
        """[1, heads, S, S] for S positions, -inf where a causal query may not look."""
        position = torch.arange(length, device=self.weight.device)
        distance = position - position[:, None]  # of a key (column) from a query (row)
        bias = self.weight[bucket(distance, len(self.weight), self.max_distance, self.causal)]
        if self.causal:
            bias = bias.masked_fill((distance > 0).unsqueeze(-1), -torch.inf)
        return rearrange(bias, "query key heads -> 1 heads query key")


def bucket(distance: Tensor, buckets: int, max_distance: int, causal: bool) -> Tensor:
    """The bucket, int64 in [0, buckets), of each distance of a key from its query, int64 of any shape.

    Half of the buckets are for one distance each, the others grow with the logarithm of the distance up to
    `max_distance`. If not causal, keys before and after the query have half of all each.

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
