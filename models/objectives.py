"""What each model is trained to do, so that a job can choose one by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from .bert import BERT, BERTConfig
from .gpt import GPT, GPTConfig
from .loss import next_token_loss
from .t5 import T5, T5Config

IGNORED = -100  # a target that counts in no loss: `torch.nn.functional.cross_entropy`'s
Batch = tuple[tuple[Tensor, ...], Tensor]


class Objective(NamedTuple):
    """A model and its task. ``loss(model(*inputs), targets)`` is one forward, for all of them::

        kind = OBJECTIVES["bert"]
        config = kind.config(dim=64, heads=2)
        model = kind.model(config)
        inputs, targets = kind.batch(config, tokens, generator)  # tokens: text, int64 [B, S + 1]
        (kind.loss(model(*inputs), targets) + aux_loss(model)).backward()

    The number of targets depends on the shape of the text alone, and so does the length of sequences: where each rank
    takes as many sequences, the mean over ranks of their losses is that of the batch.
    """

    config: Callable[..., Any]
    model: Callable[[Any], nn.Module]
    batch: Callable[[Any, Tensor, Generator | None], Batch]
    loss: Callable[[Tensor, Tensor], Tensor] = next_token_loss


def next_tokens(config: GPTConfig, tokens: Tensor, generator: Generator | None = None) -> Batch:
    """Text int64 [B, S + 1] -> ([B, S],) and targets [B, S], the token after each. Nothing is random."""
    return (tokens[:, :-1],), tokens[:, 1:]


def masked_tokens(config: BERTConfig, tokens: Tensor, generator: Generator | None = None) -> Batch:
    """Text int64 [B, S + 1] -> ([B, S],) and targets [B, S], by `mask_tokens`; the last token is not used."""
    inputs, targets = mask_tokens(tokens[:, :-1], config.mask_token, generator=generator)
    return (inputs,), targets


def cut_spans(config: T5Config, tokens: Tensor, generator: Generator | None = None) -> Batch:
    """Text int64 [B, S + 1] -> (source, target shifted by `start`) and target, by `corrupt_spans`.

    The last token of the text is not used.
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
    """Choose tokens for a model to fill in (BERT, arXiv:1810.04805, section 3.1): inputs and targets int64 [B, S].

    Of each sequence round(share * its tokens) are chosen, at least one. Of those, 80 % become `mask_token`, 10 % an
    id drawn from those below it, 10 % stay; they are the targets, the rest is `IGNORED`.

    Args:
        tokens: int64 [B, S].
        share: chosen, in [0, 1].
        mask: bool [B, S], False = padding, which is never chosen.
        generator: on the CPU; None: torch's default one.
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
    """Cut spans out of texts for a model to say (T5, arXiv:1910.10683, section 3.1.4): source and target, int64.

    n = round(share * S) tokens of each sequence are cut out, in m = round(n / mean_length) spans with others before
    each. In the source [B, S - n + m] a sentinel stands for each span, ``last_sentinel`` and down; the target
    [B, n + m + 1] is every sentinel followed by its span, and one more sentinel at the end.

    >>> source, target = corrupt_spans(torch.arange(8).expand(1, 8), 99, 90, share=0.4, mean_length=3)
    >>> source.tolist(), target.tolist()
    ([[0, 1, 2, 3, 4, 99]], [[99, 5, 6, 7, 98]])

    Args:
        tokens: int64 [B, S], S at least 2.
        below: what sentinels must stay above; ValueError if there are more spans than that.
        share: cut out, in (0, 1).
        mean_length: of spans, 1 or more.
        generator: on the CPU; None: torch's default one.
    """
    batch, length = tokens.shape
    if length < 2 or not 0 < share < 1 or mean_length < 1:
        raise ValueError(
            f"spans need 2 tokens or more, a share in (0, 1), a mean length of 1 or more; got {length}, {share}, "
            f"{mean_length}"
        )
    cut = min(max(round(share * length), 1), length - 1)
    spans = min(max(round(cut / mean_length), 1), length - cut)
    if last_sentinel - spans <= below:
        raise ValueError(f"{spans} spans need {spans + 1} sentinels, but only {last_sentinel - below} ids are theirs")
    kept_parts, cut_parts = (_parts(batch, n, spans, generator) for n in (length - cut, cut))
    ends = torch.stack([kept_parts, cut_parts], dim=2).flatten(1).cumsum(1)  # kept and cut take turns
    part = torch.searchsorted(ends, torch.arange(length).expand(batch, length).contiguous(), right=True)
    first = torch.cat([torch.ones(batch, 1, dtype=torch.bool), part[:, 1:] != part[:, :-1]], dim=1)
    part, first = part.to(tokens.device), first.to(tokens.device)
    marked = torch.where(first, last_sentinel - part // 2, tokens)
    is_cut = part % 2 == 1
    source = torch.where(is_cut, marked, tokens)[~is_cut | first].view(batch, -1)
    target = torch.where(is_cut, tokens, marked)[is_cut | first].view(batch, -1)
    return source, torch.cat([target, torch.full_like(target[:, :1], last_sentinel - spans)], dim=1)


def _parts(batch: int, length: int, number: int, generator: Generator | None) -> Tensor:
    """Random lengths int64 [B, number], all positive, that add up to `length`; every division is as likely."""
    cuts = torch.rand(batch, length - 1, generator=generator).argsort(dim=1)[:, : number - 1].sort(dim=1).values + 1
    ends = torch.cat([torch.zeros(batch, 1, dtype=torch.int64), cuts, torch.full((batch, 1), length)], dim=1)
    return ends.diff(dim=1)
