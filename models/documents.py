"""Documents that share a row of tokens: attention does not cross their boundaries."""

from __future__ import annotations

import torch
from torch import Tensor

from ..moe.routing import can_be_read


def documents_of(tokens: Tensor, eod: int) -> Tensor:
    """Number of each token's document, where each document begins with the end-of-document token.

    Rotary positions are relative: within a document they are as if it began at 0.

    Args:
        tokens: token ids, int64 [B, S]: whole rows, also where a rank computes a part of each sequence.
        eod: id of the token that begins a document.

    Returns:
        int64 [B, S], below B * S, different in different rows, and never decreasing along a row.

    >>> documents_of(torch.tensor([[5, 6, 0, 7], [0, 5, 0, 7]]), eod=0).tolist()
    [[0, 0, 1, 1], [4, 4, 5, 5]]
    """
    number = (tokens == eod).cumsum(1)
    row = torch.arange(len(tokens), device=tokens.device).unsqueeze(1) * tokens.shape[1]
    return number - number[:, :1] + row


def document_mask(documents: Tensor) -> Tensor | None:
    """Positions that each position attends to: itself, and earlier ones of its document.

    Args:
        documents: number of each token's document, int64 [B, S], as `documents_of` gives it.

    Returns:
        bool [B, 1, S, S], or None if each row is one document: a causal mask then does, which is faster.
    """
    if can_be_read(documents) and torch.equal(documents[:, :1].expand_as(documents), documents):
        return None
    place = torch.arange(documents.shape[1], device=documents.device)
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return (same & (place.unsqueeze(1) >= place)).unsqueeze(1)
