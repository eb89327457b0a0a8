"""Experts by token id: nothing is learned, and nothing can collapse."""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing import Routing
from .gate import Gate, distinct, even

GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # as int64


class HashGate(Gate):
    """A token's id alone decides, by a fixed random table (Hash Layers, Roller et al. 2021, arXiv:2106.04426).

    The table is a hash of id and seed, which needs no vocabulary size and is the same on all ranks, in all
    runs. Ids spread evenly over experts; tokens do as far as no id is frequent. Weight 1/k each.
    Pass the ids to the layer: ``moe(x, ids=ids)``.

    Args:
        dim, num_experts, top_k, scale: see `Gate`.
        seed: of the table; layers of equal seed and E send an id to equal experts.
    """

    learned = False
    balances_itself = True
    takes_ids = True

    def __init__(self, dim: int, num_experts: int, top_k: int = 1, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__(dim, num_experts, top_k, scale)
        self.seed = seed

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Routing:
        """Route tokens x [T, D] of `ids`, int64 [T]."""
        if ids is None:
            raise ValueError("the hash gate routes by token id: pass ids, int64 of x's leading shape: moe(x, ids=ids)")
        return even(x, hashed(ids, self.num_experts, self.top_k, self.seed), self.num_experts, self.scale)

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """See `Gate.weigh`."""
        return self.scaled(torch.full_like(expert, 1 / self.top_k, dtype=routing.weight.dtype))

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{super().extra_repr()}, seed={self.seed}"


def hashed(ids: Tensor, num_experts: int, k: int, seed: int = 0) -> Tensor:
    """ids int64 [T] -> k distinct experts each, [T, k], evenly spread, in integer arithmetic alone."""
    choice = torch.arange(k, device=ids.device)
    start = mixed(mixed(torch.full_like(choice[:1], seed)) ^ ids)
    draw = mixed(start.unsqueeze(1) + choice * GOLDEN) & torch.iinfo(torch.int64).max
    return distinct(draw % (num_experts - choice), num_experts)


def mixed(z: Tensor) -> Tensor:
    """One step of splitmix64 (Steele et al. 2014, doi:10.1145/2660193.2660195) on int64, which wraps around."""
    z = z + GOLDEN
    z = (z ^ _shifted(z, 30)) * FIRST
    z = (z ^ _shifted(z, 27)) * SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & (2 ** (64 - bits) - 1)  # int64 shifts its sign in; unsigned does not
