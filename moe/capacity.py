"""Expert capacity: the capacity factor, and which assignments over the limit are dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from numbers import Real

import torch
from torch import Tensor

from ..dispatch.plan import load
from .routing import Routing

POLICIES = ("score", "position", "priority")
AS_NEEDED = "as needed"


@dataclass(frozen=True)
class Capacity:
    """Limits how many rows each expert takes, and drops assignments over the limit.

    An expert takes at most ceil(factor * k * T / E) rows of a rank's T tokens. Padding tokens count in T.

    Args:
        factor: capacity factor in training, a positive number. 1.0 is an expert's even share. None drops nothing in
            training, and needs an `eval_factor`. ``"as needed"`` drops nothing either. It pads every expert to the
            largest load of any expert on any rank, which the host reads in each step (Tutel's dynamic capacity,
            arXiv:2206.03382), and sets `pad`.
        eval_factor: capacity factor in eval mode, a positive number or ``"as needed"``. None, the default, takes
            `factor`.
        minimum: smallest limit, a positive integer; 1 by default.
        drop: order in which an expert accepts its assignments: ``"score"`` (the default) takes the highest weight
            first, ``"position"`` the earliest token, ``"priority"`` the token with the highest score. See
            `drop_over_capacity`.
        pad: whether padding rows fill every expert up to the limit, so that all shapes are static; False by default.
        at_most: largest capacity factor that ``"as needed"`` may take, a positive number. Assignments over it are
            dropped. None, the default, sets no limit.

    Raises:
        TypeError, ValueError: an argument that does not fit. The message names it.

    >>> Capacity("as needed", at_most=2.0).needed(load=30, top_k=2, tokens=100, num_experts=8, training=True)
    30
    >>> Capacity(1.25, drop="position").limit(top_k=2, tokens=100, num_experts=8, training=True)
    32
    >>> Capacity(None, eval_factor=2.0).limit(top_k=1, tokens=100, num_experts=4, training=False)
    50
    """

    factor: float | str | None
    eval_factor: float | str | None = None
    minimum: int = 1
    drop: str = "score"
    pad: bool = False
    at_most: float | None = None
    _written: tuple[str | None, str | None] = field(init=False, repr=False, compare=False)  # in eval mode, in training
    follows_load: tuple[bool, bool] = field(init=False, repr=False, compare=False)  # "as needed" in eval, in training

    def __post_init__(self) -> None:
        for name in ("factor", "eval_factor"):
            factor = getattr(self, name)
            if factor is None or factor == AS_NEEDED:
                continue
            _check_factor(name, factor)
            object.__setattr__(self, name, float(factor))  # ranks compare settings, and 1 must equal 1.0
        if self.factor is None and self.eval_factor is None:
            raise ValueError("factor=None needs an eval_factor; to drop no tokens at all, set capacity=None")
        if self.factor is None and self.pad:
            raise ValueError("pad=True fills every expert up to its capacity, and factor=None sets none: set factor")
        if AS_NEEDED in (self.factor, self.eval_factor):
            object.__setattr__(self, "pad", True)
        if self.at_most is not None:
            _check_factor("at_most", self.at_most)
            if AS_NEEDED not in (self.factor, self.eval_factor):
                raise ValueError(
                    f"at_most={self.at_most} is the limit of 'as needed': set factor='as needed', or leave it out"
                )
        _check_minimum(self.minimum)
        _check_drop(self.drop)
        if not isinstance(self.pad, bool):
            raise TypeError(f"pad must be True or False; got {self.pad!r}")
        # torch.compile treats a string as a constant. It would make a float that changes a symbol, and shapes unknown.
        factors = (self.eval_factor or self.factor, self.factor)
        limits = [self.at_most if factor == AS_NEEDED else factor for factor in factors]
        object.__setattr__(self, "_written", tuple(limit and str(limit) for limit in limits))
        object.__setattr__(self, "follows_load", tuple(factor == AS_NEEDED for factor in factors))

    @classmethod
    def of(cls, given: float | str | Capacity | None, now: Capacity | None = None) -> Capacity | None:
        """The `Capacity` that an argument ``capacity=given`` stands for.

        A number or ``"as needed"`` is a capacity factor, and the other fields are taken from `now` if there is one.

        >>> Capacity.of(1.5, now=Capacity(1.25, pad=True))
        Capacity(factor=1.5, eval_factor=None, minimum=1, drop='score', pad=True, at_most=None)
        """
        if given is None or isinstance(given, Capacity):
            return given
        if given != AS_NEEDED:
            _check_factor("capacity", given)
        if now is None:
            return cls(given)
        at_most = now.at_most if AS_NEEDED in (given, now.eval_factor) else None
        return replace(now, factor=given, at_most=at_most)

    def limit(self, top_k: int, tokens: int, num_experts: int, training: bool) -> int | None:
        """Most rows that an expert takes from a rank with `tokens` tokens; None means no limit."""
        written = self._written[int(training)]  # torch 2.11's compiler takes no bool as an index
        return None if written is None else _limit(written, top_k, tokens, num_experts, self.minimum)

    def needed(self, load: int, top_k: int, tokens: int, num_experts: int, training: bool) -> int:
        """Rows of every expert where capacity follows the load; `load`: the largest load of an expert on this rank."""
        most = self.limit(top_k, tokens, num_experts, training)
        least = max(load, self.minimum) if tokens else 0
        return least if most is None else min(least, most)


def capacity_limit(factor: float, top_k: int, tokens: int, num_experts: int, minimum: int = 1) -> int:
    """Most rows that an expert takes from one rank: ceil(factor * k * T / E), at least `minimum` unless T is 0.

    T is the tokens of this rank: each pair of source rank and expert has its own limit. The decimal factor is computed
    with exactly, because a float can be one off (1.1 * 100 / 10 = 11.000000000000002).

    >>> capacity_limit(1.1, top_k=1, tokens=100, num_experts=10)
    11
    """
    _check_factor("factor", factor)
    _check_minimum(minimum)
    return _limit(str(factor), top_k, tokens, num_experts, minimum)


def _limit(factor: str, top_k: int, tokens: int, num_experts: int, minimum: int) -> int:
    above, below = _ratio(factor)
    limit = -(-above * top_k * tokens // (below * num_experts))
    return max(limit, minimum) if tokens else 0


@torch.compiler.assume_constant_result
def _ratio(factor: str) -> tuple[int, int]:
    """ "1.1" -> (11, 10)."""
    return Fraction(factor).as_integer_ratio()


def _check_factor(name: str, factor: object) -> None:
    if isinstance(factor, bool) or not isinstance(factor, Real):
        raise TypeError(
            f"{name} must be a positive number{'' if name == 'at_most' else f' or {AS_NEEDED!r}'}; got {factor!r}"
        )
    if not (math.isfinite(float(factor)) and float(factor) > 0):
        raise ValueError(f"{name} must be a positive number (capacity=None drops no token); got {factor!r}")


def _check_minimum(minimum: int) -> None:
    if not isinstance(minimum, int) or minimum < 1:
        raise ValueError(f"minimum must be a positive integer; got {minimum!r}")


def _check_drop(drop: str) -> None:
    if drop not in POLICIES:
        raise ValueError(f"drop must be one of {', '.join(POLICIES)}; got {drop!r}")


def drop_over_capacity(routing: Routing, limit: int, drop: str = "score") -> Routing:
    """Keep at most `limit` assignments of each expert, without a host sync.

    Args:
        routing: router output.
        limit: most assignments that an expert keeps.
        drop: order in which an expert accepts assignments. ``"position"``: in the order of tokens, all first choices
            before any second choice (GShard). ``"score"``, the default: highest weight first, and equal weights in the
            order of "position". ``"priority"``: like "position", but the tokens with the highest score come first
            (batch prioritized routing). It equals "score" if k = 1 and the weights are the scores.

    Returns:
        A routing in which dropped assignments have expert -1 and weight 0. Other weights do not change.

    References:
        GShard: Lepikhin et al. 2020, arXiv:2006.16668. Batch prioritized routing: Riquelme et al. 2021,
        arXiv:2106.05974.

    >>> expert, weight = torch.tensor([[0], [0], [0]]), torch.tensor([[0.5], [0.9], [0.7]])
    >>> drop_over_capacity(Routing(expert, weight, torch.ones(3, 2)), limit=2).expert.tolist()
    [[-1], [0], [0]]
    """
    _check_drop(drop)
    choice_major = routing.expert.T.flatten()  # first choices of all tokens, then second ones
    order = torch.arange(choice_major.numel(), device=choice_major.device)
    if drop == "score":
        order = routing.weight.detach().T.flatten().argsort(stable=True, descending=True)
    elif drop == "priority":
        tokens = routing.scores.detach().amax(1).argsort(stable=True, descending=True)
        order = order.view_as(routing.expert.T)[:, tokens].flatten()
    place = torch.empty_like(choice_major).scatter_(0, order, _place(choice_major[order], routing.num_experts))
    kept = (place < limit).view_as(routing.expert.T).T & (routing.expert >= 0)
    return routing.keep(kept)


def over_capacity(
    routing: Routing, capacity: Capacity | None, top_k: int, num_experts: int, training: bool
) -> tuple[Routing, int | None, bool]:
    """Apply a layer's capacity rule.

    Returns:
        The routing after capacity, the number of rows that each expert is padded to (None without padding), and whether
        that number follows the load of this rank.
    """
    if capacity is None:
        return routing, None, False
    sizes = top_k, len(routing.expert), num_experts, training
    if capacity.follows_load[int(training)]:
        load = largest_load(routing.expert, num_experts)
        limit = capacity.needed(load, *sizes)
        return routing if load <= limit else drop_over_capacity(routing, limit, capacity.drop), limit, True
    limit = capacity.limit(*sizes)
    if limit is None:
        return routing, None, False
    return drop_over_capacity(routing, limit, capacity.drop), limit if capacity.pad else None, False


@torch.compiler.disable(reason="the host reads the load")
def largest_load(expert: Tensor, num_experts: int) -> int:
    """The most assignments that any expert has, of int64 [T, k]. The host waits for it."""
    return int(load(expert, num_experts).max())


def _place(expert: Tensor, num_experts: int) -> Tensor:
    """Place of each assignment in its expert's queue, from 0: ids int64 [N] in order of acceptance -> int64 [N]."""
    ids = torch.where(expert < 0, num_experts, expert)
    order = ids.argsort(stable=True)
    counts = load(expert, num_experts + 1)  # one more entry, always 0, so that unused choices have a start as well
    start = (counts.cumsum(0) - counts)[ids[order]]
    index = torch.arange(ids.numel(), device=ids.device)
    return torch.empty_like(ids).scatter_(0, order, index - start)
