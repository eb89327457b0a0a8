"""The capacity rule: how many rows an expert takes from one rank, and whom it turns away."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor, nn

from ..dispatch.plan import load
from .routing import Routing

POLICIES = ("score", "position", "priority")


def capacity_limit(factor: float, top_k: int, tokens: int, num_experts: int, min_capacity: int = 1) -> int:
    """Rows an expert takes from one rank: ceil(factor * k * T / E), at least `min_capacity` unless T is 0.

    T is this rank's: capacity is a rule per (source rank, expert). Exact arithmetic on the factor as it
    is written, where floats would be one off (1.1 * 100 / 10 = 11.000000000000002).

    >>> capacity_limit(1.1, top_k=1, tokens=100, num_experts=10)
    11
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"capacity_factor must be a positive number, or None for dropless; got {factor}")
    if not isinstance(min_capacity, int) or min_capacity < 1:
        raise ValueError(f"min_capacity must be a positive integer; got {min_capacity!r}")
    above, below = _as_written(factor)
    limit = -(-above * top_k * tokens // (below * num_experts))
    return max(limit, min_capacity) if tokens else 0


def factor_of(name: str) -> property:
    """A layer's attribute for a capacity factor, or None, kept under `name` as text.

    To `torch.compile` a text is a constant; a float that changes would be a variable, of which nothing follows. A bad
    factor raises ValueError when it is set, not in the next step.
    """

    def get(layer: nn.Module) -> float | None:
        written = getattr(layer, name)
        return None if written is None else float(written)

    def put(layer: nn.Module, factor: float | None) -> None:
        if factor is not None:
            factor = float(factor)
            capacity_limit(factor, 1, 1, 1)
        setattr(layer, name, None if factor is None else str(factor))

    return property(get, put)


@torch.compiler.assume_constant_result
def _as_written(factor: float) -> tuple[int, int]:
    """1.1 -> (11, 10)."""
    return Fraction(str(factor)).as_integer_ratio()


def capacity(routing: Routing, limit: int, policy: str = "score") -> Routing:
    """Keep at most `limit` assignments per expert; the rest become -1 with weight 0.

    Policies, the order in which an expert accepts:
        ``"position"``: token order, all first choices before any second one (GShard, arXiv:2006.16668).
        ``"score"``: highest weight first; equal weights in the order of "position".
        ``"priority"``: as "position", with tokens in the order of their highest score (batch-prioritised routing,
        Riquelme et al. 2021, arXiv:2106.05974); for k = 1, weights being scores, the same as "score".

    The weights of what is kept do not change. No host sync.
    """
    if policy not in POLICIES:
        raise ValueError(f"drop_policy must be one of {', '.join(POLICIES)}; got {policy!r}")
    choice_major = routing.expert.T.flatten()  # every token's first choice before any second
    order = torch.arange(choice_major.numel(), device=choice_major.device)
    if policy == "score":
        order = routing.weight.detach().T.flatten().argsort(stable=True, descending=True)
    elif policy == "priority":
        tokens = routing.scores.detach().amax(1).argsort(stable=True, descending=True)
        order = order.view_as(routing.expert.T)[:, tokens].flatten()
    place = torch.empty_like(choice_major).scatter_(0, order, _place(choice_major[order], routing.num_experts))
    kept = (place < limit).view_as(routing.expert.T).T & (routing.expert >= 0)
    return routing.keep(kept)


def _place(expert: Tensor, num_experts: int) -> Tensor:
    """How many before me chose my expert: int64 [N] ids in order of acceptance, -1 = none -> int64 [N]."""
    ids = torch.where(expert < 0, num_experts, expert)
    order = ids.argsort(stable=True)
    counts = load(expert, num_experts + 1)  # the last one, of those who chose none, stays 0: it ends the list
    start = (counts.cumsum(0) - counts)[ids[order]]
    index = torch.arange(ids.numel(), device=ids.device)
    return torch.empty_like(ids).scatter_(0, order, index - start)
