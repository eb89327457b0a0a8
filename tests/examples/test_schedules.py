"""Learning-rate schedules: a warm-up, and three ways down."""

from itertools import pairwise

import pytest
from schedules import SCHEDULES, factor


def curve(schedule: str, **changes: float) -> list[float]:
    given = {"steps": 24, "warmup": 4, "end": 0.1, "decay": 0.25} | changes
    return [factor(schedule, step, **given) for step in range(25)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_and_end(schedule):
    found = curve(schedule)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == 1.0
    assert found[24] == pytest.approx(0.1)
    assert all(later <= now for now, later in pairwise(found[4:]))
    assert factor(schedule, 99, 24, 4, 0.1, 0.25) == pytest.approx(0.1)
    assert curve(schedule, warmup=0, end=0.0)[24] == pytest.approx(0.0)


def test_ways_down():
    assert curve("cosine")[14] == pytest.approx(0.55)  # half of the way
    assert curve("cosine")[9] == pytest.approx(0.1 + 0.9 * (1 + 0.5**0.5) / 2)
    assert curve("linear")[9] == pytest.approx(0.1 + 0.9 * 0.75)
    assert curve("wsd")[19] == 1.0  # three quarters of 20 steps
    assert curve("wsd")[20:] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1])
