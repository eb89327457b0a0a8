"""`plan_placement`: which rank should own which expert, so that the largest load of a rank is least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SAME = 1e-9  # relative difference below which two loads count as equal
STAY = 0.02  # share of the largest load that a plan from nothing must save, before it replaces one from `current`


class PlacementPlan(NamedTuple):
    """Which rank owns which expert, which experts are shadowed, and the load of each rank then.

    Attributes:
        order: global id of the expert in each slot, E ids. Rank r has the slots from r * E / W on, E / W of them.
        shadow: global ids of experts to shadow (`MoE.shadow`), ascending.
        rank_loads: load of each rank, in the unit of the loads that were given. Each rank has an equal share of the
            tokens of shadowed experts.
    """

    order: tuple[int, ...]
    shadow: tuple[int, ...]
    rank_loads: tuple[float, ...]


def plan_placement(
    loads: Sequence[float] | Tensor,
    ranks: int,
    *,
    nodes: int = 1,
    groups: int | None = None,
    shadowed: int = 0,
    current: Sequence[int] | None = None,
) -> PlacementPlan:
    """Choose the rank of each expert, so that the largest load of a rank is least. It is a pure function.

    Experts go to the least loaded rank with room, the heaviest first. Then the fullest rank exchanges single experts
    with others as long as that lowers the larger of the two loads. On one node, the largest load exceeds the mean by
    less than the difference between the heaviest and the lightest expert.

    Args:
        loads: expected tokens of each expert, E numbers that are not negative, such as ``Load.tokens_per_expert``.
        ranks: number of ranks W that share the experts, which is the size of "ep". It divides E.
        nodes: number of nodes that the ranks fill evenly, 1 by default. Groups of experts are first spread over nodes,
            then the experts of each node over its ranks.
        groups: number of groups of consecutive experts. Each group stays on one node, as routers want that choose
            groups first (`SigmoidGate`). None, the default, lets each expert be a group.
        shadowed: most experts that may be shadowed, 0 by default. Each of them takes memory for its weights on every
            rank. The heaviest are shadowed, and no more of them than lower the largest load.
        current: order of the experts now. Each expert stays where it is unless its move lowers a load, so that few of
            them move, unless a plan from nothing is more than 2 % better. None, the default, plans from nothing.

    Returns:
        The plan. `place_experts` carries it out.

    Raises:
        ValueError: sizes that do not divide each other, loads that are negative or not finite, or a `current` that is
            no order of all experts.

    References:
        EPLB, the load balancer of DeepSeek-V3 (arXiv:2412.19437, section 3.4), which replicates experts.

    >>> plan_placement([9, 8, 1, 2], ranks=2)
    PlacementPlan(order=(0, 2, 1, 3), shadow=(), rank_loads=(10.0, 10.0))
    >>> plan_placement([90, 8, 1, 2], ranks=2, shadowed=1, current=range(4)).shadow
    (0,)
    """
    values = [float(load) for load in (loads.tolist() if isinstance(loads, Tensor) else loads)]
    experts, groups = len(values), len(values) if groups is None else groups
    _check(values, ranks, nodes, groups, shadowed)
    if current is not None and sorted(current) != list(range(experts)):
        raise ValueError(f"current must have each of the experts 0 to {experts - 1} once; got {list(current)}")
    hottest = sorted(range(experts), key=lambda expert: -values[expert])

    def plan(number: int) -> PlacementPlan:
        shadow = tuple(sorted(hottest[:number]))
        found = _plan(values, shadow, ranks, nodes, groups, None)
        if current is None:
            return found
        near = _plan(values, shadow, ranks, nodes, groups, current)
        return found if _largest(found) < _largest(near) * (1 - STAY) else near

    best = plan(0)
    for number in range(1, shadowed + 1):
        if _largest(other := plan(number)) < _largest(best) * (1 - SAME):
            best = other
    return best


def _largest(plan: PlacementPlan) -> float:
    return max(plan.rank_loads)


def _check(values: list[float], ranks: int, nodes: int, groups: int, shadowed: int) -> None:
    experts = len(values)
    if bad := [load for load in values if not (load >= 0 and math.isfinite(load))]:
        raise ValueError(f"loads must be finite and not negative; got {bad[0]}")
    for name, number in {"ranks": ranks, "nodes": nodes, "groups": groups}.items():
        if type(number) is not int or number < 1:
            raise ValueError(f"{name} must be a positive integer; got {number!r}")
    if type(shadowed) is not int or not 0 <= shadowed <= experts:
        raise ValueError(f"shadowed must be 0 to {experts}, the number of experts; got {shadowed!r}")
    for name, number, by, divisor in (
        ("experts", experts, "ranks", ranks),
        ("ranks", ranks, "nodes", nodes),
        ("experts", experts, "groups", groups),
        ("groups", groups, "nodes", nodes),
    ):
        if number % divisor or not number:
            raise ValueError(f"{name}={number} does not split over {by}={divisor}: give a divisor of {number}")


def _plan(
    values: list[float], shadow: tuple[int, ...], ranks: int, nodes: int, groups: int, current: Sequence[int] | None
) -> PlacementPlan:
    """The plan with these experts shadowed: they count for nothing where they lie."""
    alone, experts = [0.0 if e in shadow else load for e, load in enumerate(values)], len(values)
    held, per_node, size = experts // ranks, ranks // nodes, experts // groups
    now: list[int | None] = [None] * experts  # rank of each expert
    for slot, expert in enumerate(current or ()):
        now[expert] = slot // held

    def node_now(group: int) -> int | None:
        found = {None if rank is None else rank // per_node for rank in now[group * size : (group + 1) * size]}
        return found.pop() if len(found) == 1 else None

    node_of = _balanced(
        [sum(alone[group * size : (group + 1) * size]) for group in range(groups)],
        nodes,
        [node_now(group) for group in range(groups)],
    )
    rank_of = [0] * experts
    for node in range(nodes):
        inside, first = [e for e in range(experts) if node_of[e // size] == node], node * per_node
        stays = [rank - first if (rank := now[e]) is not None and rank // per_node == node else None for e in inside]
        for expert, rank in zip(inside, _balanced([alone[e] for e in inside], per_node, stays), strict=True):
            rank_of[expert] = first + rank
    share = sum(values[expert] for expert in shadow) / ranks
    rank_loads = [sum(load for e, load in enumerate(alone) if rank_of[e] == rank) + share for rank in range(ranks)]
    return PlacementPlan(_in_slots(rank_of, held, current), shadow, tuple(rank_loads))


def _balanced(loads: list[float], bins: int, now: list[int | None]) -> list[int]:
    """The bin of each item, equally many in each, so that the largest load of a bin is small.

    Items stay in their bin of now, if they have one, until an exchange pays.
    """
    room = [len(loads) // bins - now.count(at) for at in range(bins)]
    total = [sum(load for load, own in zip(loads, now, strict=True) if own == at) for at in range(bins)]
    chosen = list(now)
    for item in sorted((i for i, at in enumerate(now) if at is None), key=lambda i: -loads[i]):
        chosen[item] = at = min((at for at in range(bins) if room[at]), key=total.__getitem__)
        room[at] -= 1
        total[at] += loads[item]
    load, where = torch.tensor(loads, dtype=torch.float64), torch.tensor(chosen)
    while bins > 1:
        sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, where, load)
        top = int(sums.argmax())
        mine, others = (where == top).nonzero().flatten(), (where != top).nonzero().flatten()
        less = load[mine].unsqueeze(1) - load[others]  # what an exchange takes from the fullest bin
        after = torch.maximum(sums[top] - less, sums[where[others]] + less)
        if after.min() >= sums[top] * (1 - SAME):
            break
        i, j = divmod(int(after.argmin()), len(others))
        where[mine[i]], where[others[j]] = where[others[j]].clone(), top
    return where.tolist()


def _in_slots(rank_of: list[int], held: int, current: Sequence[int] | None) -> tuple[int, ...]:
    """The expert in each slot. One that stays on its rank keeps its slot."""
    slots: list[int | None] = [None] * len(rank_of)
    for slot, expert in enumerate(current or ()):
        if rank_of[expert] == slot // held:
            slots[slot] = expert
    placed = set(slots)
    left = iter(sorted((e for e in range(len(rank_of)) if e not in placed), key=rank_of.__getitem__))
    return tuple(next(left) if expert is None else expert for expert in slots)
