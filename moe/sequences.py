"""Sums of routings over the tokens of each sequence, or of each document where several share a sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..dispatch.plan import load
from .routing import Routing


class Sums(NamedTuple):
    """Sums over the tokens on this rank, for each of n sequences or documents."""

    mass: Tensor  # [n, E]: scores
    chosen: Tensor  # [n, E]: assignments of each expert
    tokens: Tensor  # [n]: real tokens, so without padding

    @classmethod
    def by_sequence(cls, routing: Routing, scores: Tensor, sequences: int) -> Sums:
        """Sums for equally long sequences, whose tokens are adjacent. `scores`, [T, E], are those to add up."""
        # a rank without tokens takes part with zeros that have a graph
        E = routing.num_experts
        mass = scores.reshape(sequences, -1, E).sum(1) if len(scores) else scores.sum(0).expand(sequences, E)
        return cls(
            mass,
            _load_by_sequence(routing, sequences).to(mass.dtype),
            _tokens_by_sequence(routing, sequences).to(mass.dtype),
        )

    @classmethod
    def by_document(cls, routing: Routing, scores: Tensor, split: ProcessGroup | None) -> Sums:
        """Sums for each number of `Routing.documents`, of which there are at most as many as tokens on all of `split`.

        That bound needs no wait for the device, and these sums are then as large as the scores.
        """
        assert routing.documents is not None
        E, size = routing.num_experts, 1 if split is None else dist.get_world_size(split)
        n, documents = len(routing.expert) * size, routing.documents
        ids = torch.where(routing.expert < 0, -1, routing.expert + E * documents.unsqueeze(1))
        real = torch.ones_like(documents) if routing.mask is None else routing.mask.to(documents.dtype)
        return cls(
            scores.new_zeros(n, E).index_add(0, documents, scores),
            load(ids, n * E).reshape(n, E).to(scores.dtype),
            documents.new_zeros(n).index_add(0, documents, real).to(scores.dtype),
        )


def _load_by_sequence(routing: Routing, sequences: int) -> Tensor:
    """Number of assignments for each sequence and expert, int64 [sequences, E]."""
    E = routing.num_experts
    if sequences == 1:
        return load(routing.expert, E).unsqueeze(0)
    # not repeat_interleave: torch 2.11's compiler treats its number of repeats as a constant
    sequence = torch.arange(sequences, device=routing.expert.device).unsqueeze(1)
    sequence = sequence.expand(-1, len(routing.expert) // max(sequences, 1)).flatten()
    ids = torch.where(routing.expert < 0, -1, routing.expert + E * sequence.unsqueeze(1))
    return load(ids, sequences * E).reshape(sequences, E)


def _tokens_by_sequence(routing: Routing, sequences: int) -> Tensor:
    """Number of real tokens, so without padding, in each sequence: [sequences]."""
    if routing.mask is not None:
        return routing.mask.reshape(sequences, -1).sum(1) if len(routing.mask) else routing.mask.new_zeros(sequences)
    return torch.full((sequences,), len(routing.scores) // max(sequences, 1), device=routing.scores.device)
