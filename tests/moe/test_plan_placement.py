"""The planner of placements: against all placements there are, and against EPLB's published example."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from turnout.moe import PlacementPlan, plan_placement


def best(loads: list[float], ranks: int) -> float:
    """The least largest load of all placements."""
    held, found = len(loads) // ranks, [sum(loads)]

    def place(left: list[float], largest: float) -> None:
        if not left:
            found[0] = min(found[0], largest)
        elif largest < found[0]:
            for others in combinations(range(1, len(left)), held - 1):
                rest = [load for i, load in enumerate(left) if i not in (0, *others)]
                place(rest, max(largest, left[0] + sum(left[i] for i in others)))

    place(loads, 0.0)
    return found[0]


def rank_loads(loads: list[float], plan: PlacementPlan, ranks: int) -> list[float]:
    """Of a plan, counted anew."""
    held, share = len(loads) // ranks, sum(loads[e] for e in plan.shadow) / ranks
    slots = [0.0 if e in plan.shadow else loads[e] for e in plan.order]
    return [sum(slots[rank * held : (rank + 1) * held]) + share for rank in range(ranks)]


@st.composite
def cases(draw):
    ranks, held = draw(st.sampled_from([(1, 3), (2, 1), (2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (3, 3)]))
    numbers = st.integers(0, 9) | st.integers(0, 1000) | st.floats(0, 100)
    loads = draw(st.lists(numbers, min_size=ranks * held, max_size=ranks * held))
    return [float(load) for load in loads], ranks, draw(st.none() | st.permutations(range(ranks * held)))


@given(cases())
def test_a_plan_has_each_expert_once_and_is_near_the_best_one(case):
    loads, ranks, current = case
    plan = plan_placement(loads, ranks, current=current)
    assert sorted(plan.order) == list(range(len(loads)))
    assert plan.rank_loads == pytest.approx(rank_loads(loads, plan, ranks))
    largest, mean = max(plan.rank_loads), sum(loads) / ranks
    assert largest <= mean + max(loads) - min(loads) + 1e-6  # what the docstring says
    assert largest <= 4 / 3 * best(loads, ranks) + 1e-6
    assert plan == plan_placement(torch.tensor(loads, dtype=torch.float64), ranks, current=current)


def test_most_plans_are_the_best_there_is():
    drawn, ratios = random.Random(0), []
    for _ in range(60):
        ranks, held = drawn.choice([(2, 4), (4, 2), (3, 3)])
        loads = [drawn.random() ** 3 for _ in range(ranks * held)]
        ratios.append(max(plan_placement(loads, ranks).rank_loads) / best(loads, ranks))
    assert max(ratios) < 1.1
    assert sum(ratio < 1.0001 for ratio in ratios) > 45


@given(cases(), st.integers(0, 3))
def test_shadowed_experts_are_the_heaviest_and_as_few_as_help(case, number):
    loads, ranks, current = case
    plans = [plan_placement(loads, ranks, shadowed=n, current=current) for n in range(min(number, len(loads)) + 1)]
    for n, plan in enumerate(plans):
        assert len(plan.shadow) <= n
        assert plan.rank_loads == pytest.approx(rank_loads(loads, plan, ranks))
        rest = [load for e, load in enumerate(loads) if e not in plan.shadow]
        assert min((loads[e] for e in plan.shadow), default=0) >= max(rest, default=0) or not plan.shadow
    largest = [max(plan.rank_loads) for plan in plans]
    assert largest == sorted(largest, reverse=True)
    for fewer, more in pairwise(plans):
        assert fewer == more or max(more.rank_loads) < max(fewer.rank_loads)


def test_groups_stay_on_a_node_and_experts_where_they_are():
    drawn = random.Random(0)
    for _ in range(20):
        loads = [drawn.random() ** 4 for _ in range(24)]
        plan = plan_placement(loads, 4, nodes=2, groups=6)
        for first in range(0, 24, 4):
            assert len({plan.order.index(e) // 12 for e in range(first, first + 4)}) == 1
        again = plan_placement(loads, 4, nodes=2, groups=6, current=plan.order)
        assert again.order == plan.order
    even = plan_placement([1.0] * 8, 4, current=[3, 1, 0, 2, 7, 6, 5, 4])
    assert even.order == (3, 1, 0, 2, 7, 6, 5, 4)
    moved = plan_placement([9, 9, 1, 1, 5, 5, 5, 5], 4, current=range(8)).order
    assert moved[4:] == (4, 5, 6, 7)
    assert {moved.index(0) // 2, moved.index(1) // 2} == {0, 1}


# The loads of the example in the README of DeepSeek's EPLB, and the largest load of a rank in what it finds for them.
EXAMPLE = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
EPLB = [
    # ranks, nodes, groups, redundant experts: as many on each rank as shadowed ones, largest loads of both layers
    ((4, 1, None, 0), (277.0, 292.0)),
    ((4, 2, 4, 0), (309.0, 345.0)),
    ((4, 2, None, 0), (295.0, 299.0)),
    ((6, 1, None, 0), (204.0, 213.0)),
    ((6, 2, 4, 0), (223.0, 243.0)),
    ((2, 2, 4, 0), (587.0, 645.0)),
    ((4, 1, None, 4), (275.5, 292.0)),
    ((4, 2, 4, 4), (299.5, 345.0)),
]


@pytest.mark.parametrize("case", EPLB, ids=str)
def test_the_example_of_eplb_is_balanced_as_well_as_eplb_does(case):
    (ranks, nodes, groups, redundant), largest = case
    for loads, theirs in zip(EXAMPLE, largest, strict=True):
        plan = plan_placement(loads, ranks, nodes=nodes, groups=groups, shadowed=redundant // ranks)
        assert max(plan.rank_loads) <= theirs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0, 3.0], 2), "experts=3 does not split over ranks=2: give a divisor of 3"),
        (([1.0] * 8, 4, 3), "ranks=4 does not split over nodes=3"),
        (([1.0] * 8, 4, 2, 3), "experts=8 does not split over groups=3"),
        (([1.0] * 8, 4, 4, 2), "groups=2 does not split over nodes=4"),
        (([1.0, -2.0], 2), "loads must be finite and not negative; got -2.0"),
        (([1.0, float("nan")], 2), "loads must be finite and not negative; got nan"),
        (([1.0, 2.0], 0), "ranks must be a positive integer; got 0"),
        (([1.0, 2.0], 2, 1, None, 3), "shadowed must be 0 to 2, the number of experts; got 3"),
        (([1.0, 2.0], 2, 1, None, 0, [0, 0]), r"current must have each of the experts 0 to 1 once; got \[0, 0\]"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    loads, ranks, *others = arguments
    options = dict(zip(("nodes", "groups", "shadowed", "current"), others, strict=False))
    with pytest.raises(ValueError, match=message):
        plan_placement(loads, ranks, **options)
