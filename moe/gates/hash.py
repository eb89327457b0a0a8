"""Hash gate: the token id alone decides the experts, and nothing is learned."""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing import Routing
from .gate import Gate, distinct, even_routing

GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # of splitmix64, as int64


class HashGate(Gate):
    """Routing by a hash of the token id. Pass the ids to the layer: ``moe(x, ids=ids)``.

    The hash of id and seed needs no vocabulary size, and is the same on all ranks and in all runs. Ids are spread
    evenly over the experts. Loads are even if no id is very frequent. Each expert has weight 1/k.

    Args:
        dim, num_experts, top_k, scale: see `Gate`; `top_k` is 1 by default.
        seed: seed of the hash; 0 by default. Layers with the same seed and E send an id to the same experts.

    References:
        Hash layers: Roller et al. 2021, arXiv:2106.04426.

    >>> gate, x = HashGate(dim=4, num_experts=8), torch.randn(3, 4)
    >>> first, second, third = gate(x, ids=torch.tensor([7, 5, 7])).expert.tolist()
    >>> first == third
    True
    """

    learned = False
    balances_itself = True
    takes_ids = True

    def __init__(self, dim: int, num_experts: int, top_k: int = 1, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__(dim, num_experts, top_k, scale)
        self.seed = seed

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Routing:
        """Route tokens x [T, D] by their `ids`, int64 [T]."""
        if ids is None:
            raise ValueError(
                "the hash gate routes by token id, and ids is None: call moe(x, ids=ids) with int64 ids of x's leading "
                "shape"
            )
        return even_routing(x, hashed(ids, self.num_experts, self.top_k, self.seed), self.num_experts, self.scale)

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """See `Gate.weigh`."""
        return self.scaled(torch.full_like(expert, 1 / self.top_k, dtype=routing.weight.dtype))

    def extra_repr(self) -> str:
        """Text that ``print(model)`` shows."""
        return f"{super().extra_repr()}, seed={self.seed}"


def hashed(ids: Tensor, num_experts: int, k: int, seed: int = 0) -> Tensor:
    """k distinct experts for each id: int64 [T] -> int64 [T, k], spread evenly, in integer arithmetic alone."""
    choice = torch.arange(k, device=ids.device)
    start = mixed(mixed(torch.full_like(choice[:1], seed)) ^ ids)
    draw = mixed(start.unsqueeze(1) + choice * GOLDEN) & torch.iinfo(torch.int64).max
    return distinct(draw % (num_experts - choice))


def mixed(z: Tensor) -> Tensor:
    """One step of the splitmix64 generator, on int64 that wraps around (Steele 2014, doi:10.1145/2660193.2660195)."""
    z = z + GOLDEN
    z = (z ^ _shifted(z, 30)) * FIRST
    z = (z ^ _shifted(z, 27)) * SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & (2 ** (64 - bits) - 1)  # the mask clears the copies of the sign that int64 shifts in
