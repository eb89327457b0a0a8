"""Sums of a routing over the tokens of each document, where several share a sequence."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..dispatch.plan import load
from .routing import Routing


def sums_by_document(
    routing: Routing, scores: Tensor, split: ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over this rank's tokens for each number in `Routing.documents`.

    There are at most as many numbers n as tokens on all ranks of `split`. That bound needs no wait for the device, and
    the sums are then as large as the scores.

    Args:
        routing: router output for T tokens, with their documents.
        scores: scores to add up, [T, E].
        split: ranks that hold parts of the same sequences. None, the default, is this rank alone.

    Returns:
        Sums of scores [n, E], assignments of each expert [n, E], and real tokens [n], in the dtype of the scores.

    >>> routing = Routing(torch.tensor([[0], [1], [1]]), torch.ones(3, 1), torch.eye(3)[:, :2])
    >>> mass, chosen, tokens = sums_by_document(routing.within(torch.tensor([0, 0, 2])), routing.scores)
    >>> chosen.tolist(), tokens.tolist()
    ([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]], [2.0, 0.0, 1.0])
    """
    documents = routing.documents
    assert documents is not None
    n = len(documents) * (1 if split is None else dist.get_world_size(split))
    E = routing.num_experts
    ids = torch.where(routing.expert < 0, -1, routing.expert + E * documents.unsqueeze(1))
    real = torch.ones_like(documents) if routing.mask is None else routing.mask.to(documents.dtype)
    return (
        scores.new_zeros(n, E).index_add(0, documents, scores),
        load(ids, n * E).reshape(n, E).to(scores.dtype),
        documents.new_zeros(n).index_add(0, documents, real).to(scores.dtype),
    )
