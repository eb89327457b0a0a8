"""The cost model of a layer, against sums over ranks and bytes that can be counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from turnout.dispatch.autoselect.profile import Link, Profile, Work
from turnout.moe.parallel.costs import LayerChoice, LayerCosts, LayerLoad

NONE, BYTES = Link(0.0, 0.0, 0.0), Link(0.0, 0.0, 1.0)
OWNERS = (0, 0, 1, 1, 2, 2, 3, 3)
EVEN = LayerLoad(10.0, (0.125,) * 8, OWNERS)
HOT = EVEN._replace(shares=(0.3, 0.1, *(0.1,) * 6))


def costs(ways: int = 1, **more) -> LayerCosts:
    """Costs of bytes between 4 ranks alone: rows of 1 byte, experts of 100, of which 60 learn."""
    given = {"links": Profile(4, 1, NONE, BYTES), "slices": NONE, "ways": ways, "copy": 0.0, "work": Work(0.0, 0.0)}
    sizes = {"each": 0.0, "top_k": 2, "num_experts": 8, "row_bytes": 1, "expert_bytes": 100, "learned_bytes": 60}
    return LayerCosts(**{**given, **sizes, **more})


def seconds(model: LayerCosts, load: LayerLoad, r: int, shadow: int = 0) -> float:
    (found,) = model.predict(load, [r], [shadow], ["flat"], [1]).values()
    return found


def test_gathering_all_takes_what_theory_says():
    """P (W - 1) / W in the forward, and the gradients of what learns in the backward."""
    assert seconds(costs(), EVEN, 0) == pytest.approx((100 + 60) * 8 * 3 / 4)
    assert seconds(costs(), HOT, 0) == seconds(costs(), EVEN, 0)


def test_tokens_take_four_times_their_rows():
    """Out and home, forward and backward; three of four rows go to another rank."""
    assert seconds(costs(), EVEN, 1) == pytest.approx(4 * 10 * 2 * 3 / 4)
    # the first rank's experts have 0.4 of all rows: it receives those of three ranks
    assert seconds(costs(), HOT, 1) == pytest.approx(4 * 10 * 2 * 3 * 0.4)


def test_shadowed_experts_take_their_weights_and_spare_their_rows():
    rows = 4 * 10 * 2 * 3 * 0.2  # now each rank has 0.2, 0.1 in the first
    pieces = (100 + 60) * (3 / 4 + 3 / 4)  # one of one: in pieces to all, who hand them on
    assert seconds(costs(), HOT, 1, shadow=1) == pytest.approx(rows + pieces)
    spread = EVEN._replace(shares=(0.2, 0.05) * 4)  # the hottest four are on four ranks
    direct = (100 + 60) * 3
    assert seconds(costs(), spread, 1, shadow=4) == pytest.approx(4 * 10 * 2 * 3 * 0.05 + direct)


@pytest.mark.parametrize(("r", "experts", "rows"), [(4, 0, 3), (2, 1, 1), (1, 3, 0)])
def test_slices_take_weights_or_rows(r, experts, rows):
    """s = 4 slices: a rank gathers P / W (s / r - 1), and sends each of its rows to r - 1 others."""
    model = costs(4, slices=BYTES, links=Profile(1, 1, NONE, NONE), num_experts=1)
    load = LayerLoad(10.0, (1.0,), (0,))
    weights = (100 + 60) / 4 * experts
    assert seconds(model, load, r) == pytest.approx(weights + 4 * 10 * 2 * rows)


def test_gathering_all_over_slices():
    model = costs(4, slices=BYTES, links=Profile(1, 1, NONE, NONE), num_experts=1)
    assert seconds(model, LayerLoad(10.0, (1.0,), (0,)), 0) == pytest.approx((100 + 60) * 3 / 4)


def test_compute_is_of_the_slowest_rank_or_of_shared_processors():
    work = costs(links=Profile(4, 1, NONE, NONE), work=Work(1.0, 1.0))
    assert seconds(work, HOT, 1) == pytest.approx(3 * 4 * 10 * 2 * 0.4)  # backward takes twice as long as forward
    assert seconds(work, HOT, 1, shadow=1) == pytest.approx(3 * 4 * 10 * 2 * 0.2 + 3 * 10 * 2 * 0.3)
    assert seconds(work, HOT, 0) == pytest.approx(3 * 10 * 2)
    shared = costs(links=Profile(4, 1, NONE, NONE), work=Work(0.25, 1.0))  # alone, a rank is four times as fast
    assert seconds(shared, HOT, 1) == pytest.approx(3 * 10 * 2)  # it is all one who computes
    each = costs(links=Profile(4, 1, NONE, NONE), each=1.0)
    assert [seconds(each, HOT, 0), seconds(each, HOT, 1), seconds(each, HOT, 1, shadow=3)] == [8, 2, 5]


LOADS = st.lists(st.floats(0, 1), min_size=8, max_size=8).filter(sum).map(lambda s: tuple(x / sum(s) for x in s))


@given(LOADS, st.integers(1, 8))
def test_the_hottest_are_the_hottest(shares, number):
    load = EVEN._replace(shares=shares)
    hot = load.hottest(number)
    assert min(shares[e] for e in hot) >= max((shares[e] for e in range(8) if e not in hot), default=0.0)
    assert sum(load.ranks) == pytest.approx(1)
    assert sum(load.ranks_without(hot)) == pytest.approx(1 - sum(shares[e] for e in hot))


@given(LOADS)
def test_an_uneven_load_is_never_predicted_to_be_faster(shares):
    model = costs(work=Work(1.0, 1.0), copy=0.1, each=0.5)
    for r in (0, 1):
        assert seconds(model, EVEN._replace(shares=shares), r) >= seconds(model, EVEN, r) * (1 - 1e-9)


def test_each_combination_is_predicted_once():
    model = costs(2, links=Profile(2, 2, BYTES, BYTES), slices=BYTES)
    found = model.predict(EVEN, [0, 1, 2], [0, 1, 2], ["flat", "2dh", "node"], [1, 2, 4])
    assert len(found) == 1 + 2 * 3 * 3 * 3
    assert LayerChoice(0, 0, "flat", 1) in found
