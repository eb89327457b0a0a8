"""Training objectives by name: next tokens for GPT, masked tokens for BERT, span corruption for T5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from .bert import BERT, BERTConfig
from .gpt import GPT, GPTConfig
from .loss import IGNORED, next_token_loss
from .t5 import T5, T5Config

Batch = tuple[tuple[Tensor, ...], Tensor]


class Objective(NamedTuple):
    """A model and its training task. One training loop serves all of them.

    Inputs and targets have shapes that depend on the shape of the text alone. So if each rank takes as many sequences,
    the mean of the ranks' losses is the loss of the batch.

    Attributes:
        config: class of the model's sizes.
        model: class of the model, built from a config.
        batch: function (config, text int64 [B, S + 1], generator or None) -> (inputs of the model, targets).
        loss: function (logits, targets) -> scalar.

    >>> kind = OBJECTIVES["bert"]
    >>> config = kind.config(dim=32, layers=2, heads=2, hidden=16, num_experts=4)
    >>> model, text = kind.model(config), torch.randint(256, (3, 9))
    >>> inputs, targets = kind.batch(config, text, None)
    >>> kind.loss(model(*inputs), targets).shape
    torch.Size([])
    """

    config: Callable[..., Any]
    model: Callable[[Any], nn.Module]
    batch: Callable[[Any, Tensor, Generator | None], Batch]
    loss: Callable[[Tensor, Tensor], Tensor] = next_token_loss


def next_tokens(config: GPTConfig, tokens: Tensor, generator: Generator | None = None) -> Batch:
    """Inputs and targets of next-token prediction: text int64 [B, S + 1] -> ([B, S],) and targets [B, S]."""
    return (tokens[:, :-1],), tokens[:, 1:]


def masked_tokens(config: BERTConfig, tokens: Tensor, generator: Generator | None = None) -> Batch:
    """Inputs and targets by `mask_tokens`: text int64 [B, S + 1] -> ([B, S],) and [B, S]. The last token is unused."""
    inputs, targets = mask_tokens(tokens[:, :-1], config.mask_token, generator=generator)
    return (inputs,), targets


def cut_spans(config: T5Config, tokens: Tensor, generator: Generator | None = None) -> Batch:
    """Inputs and targets by `corrupt_spans`: text int64 [B, S + 1] -> (source, decoder's input) and target.

    The decoder's input is the target shifted by one, with ``config.start`` first. The last token of the text is unused.
    """
    source, target = corrupt_spans(tokens[:, :-1], config.vocab - 1, config.start, generator=generator)
    start = torch.full_like(target[:, :1], config.start)
    return (source, torch.cat([start, target[:, :-1]], dim=1)), target


OBJECTIVES = {
    "gpt": Objective(GPTConfig, GPT, next_tokens),
    "bert": Objective(BERTConfig, BERT, masked_tokens),
    "t5": Objective(T5Config, T5, cut_spans),
}


def mask_tokens(
    tokens: Tensor,
    mask_token: int,
    share: float = 0.15,
    mask: Tensor | None = None,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask tokens for a model to predict, as BERT does.

    Each sequence of n tokens has round(share * n) targets, at least one. Of the targets 80 % become `mask_token`, 10 %
    a random id below it, and 10 % stay.

    Args:
        tokens: token ids, int64 [B, S].
        mask_token: id that replaces a token.
        share: share of tokens that are targets, in [0, 1]; 0.15 by default.
        mask: bool [B, S], False = padding, which is never a target. None, the default, has no padding.
        generator: random generator on the CPU. None, the default, is torch's default one.

    Returns:
        Inputs and targets, both int64 [B, S]. Targets are -100 where there is nothing to predict.

    Raises:
        ValueError: `share` lies outside [0, 1].

    References:
        Devlin et al., BERT, arXiv:1810.04805, section 3.1.

    >>> inputs, targets = mask_tokens(torch.arange(8).view(2, 4), mask_token=256, share=0.5)
    >>> (targets != -100).sum(1).tolist()
    [2, 2]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1]; got {share}")
    device, shape = tokens.device, tokens.shape
    real = torch.ones(shape, dtype=torch.bool) if mask is None else mask.cpu()
    place = torch.rand(shape, generator=generator).masked_fill(~real, 2.0).argsort(dim=1).argsort(dim=1)
    number = (share * real.sum(1, keepdim=True)).round().clamp(min=1)
    chosen = ((place < number) & real).to(device)
    fate = torch.rand(shape, generator=generator).to(device)
    other = torch.randint(mask_token, shape, generator=generator).to(device)
    changed = torch.where(fate < 0.8, mask_token, torch.where(fate < 0.9, other, tokens))
    return torch.where(chosen, changed, tokens), torch.where(chosen, tokens, IGNORED)


def corrupt_spans(
    tokens: Tensor,
    last_sentinel: int,
    below: int,
    share: float = 0.15,
    mean_length: float = 3.0,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Remove spans from texts for a model to predict, as T5 does (span corruption).

    n = round(share * S) tokens of each sequence are removed, in m = round(n / mean_length) spans. Sentinels count down
    from `last_sentinel`, one for each span.

    Args:
        tokens: token ids, int64 [B, S], with S at least 2.
        last_sentinel: id of the first span's sentinel; the next ones are smaller.
        below: id that all sentinels must stay above.
        share: share of tokens that are removed, in (0, 1); 0.15 by default.
        mean_length: mean length of a span, 1 or more; 3 by default.
        generator: random generator on the CPU. None, the default, is torch's default one.

    Returns:
        Source and target. The source, int64 [B, S - n + m], has a sentinel in place of each span. The target, int64
        [B, n + m + 1], has each sentinel followed by its span, and one more sentinel at the end.

    Raises:
        ValueError: numbers out of range, or more spans than there are sentinels.

    References:
        Raffel et al., T5, arXiv:1910.10683, section 3.1.4.

    >>> source, target = corrupt_spans(torch.arange(8).expand(1, 8), 99, 90, share=0.4, mean_length=3)
    >>> source.tolist(), target.tolist()
    ([[0, 1, 2, 3, 4, 99]], [[99, 5, 6, 7, 98]])
    """
    batch, length = tokens.shape
    if length < 2 or not 0 < share < 1 or mean_length < 1:
        raise ValueError(
            "corrupt_spans needs 2 tokens or more, share in (0, 1) and mean_length of 1 or more; got "
            f"{length} tokens, share={share}, mean_length={mean_length}"
        )
    cut = min(max(round(share * length), 1), length - 1)
    spans = min(max(round(cut / mean_length), 1), length - cut)
    if last_sentinel - spans <= below:
        raise ValueError(
            f"{spans} spans need {spans + 1} sentinels, but only {last_sentinel - below} ids lie above {below}: use "
            "shorter sequences, a smaller share, longer spans or a larger vocab"
        )
    kept_parts, cut_parts = (_parts(batch, n, spans, generator) for n in (length - cut, cut))
    ends = torch.stack([kept_parts, cut_parts], dim=2).flatten(1).cumsum(1)  # kept and removed parts alternate
    part = torch.searchsorted(ends, torch.arange(length).expand(batch, length).contiguous(), right=True)
    first = torch.cat([torch.ones(batch, 1, dtype=torch.bool), part[:, 1:] != part[:, :-1]], dim=1)
    part, first = part.to(tokens.device), first.to(tokens.device)
    marked = torch.where(first, last_sentinel - part // 2, tokens)
    is_cut = part % 2 == 1
    source = torch.where(is_cut, marked, tokens)[~is_cut | first].view(batch, -1)
    target = torch.where(is_cut, tokens, marked)[is_cut | first].view(batch, -1)
    return source, torch.cat([target, torch.full_like(target[:, :1], last_sentinel - spans)], dim=1)


def _parts(batch: int, length: int, number: int, generator: Generator | None) -> Tensor:
    """Random positive lengths, int64 [B, number], that add up to `length`; every division is equally likely."""
    cuts = torch.rand(batch, length - 1, generator=generator).argsort(dim=1)[:, : number - 1].sort(dim=1).values + 1
    ends = torch.cat([torch.zeros(batch, 1, dtype=torch.int64), cuts, torch.full((batch, 1), length)], dim=1)
    return ends.diff(dim=1)
