"""Load statistics by hand and against the reference."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import routings
from turnout.moe import Capacity, MoE, Stats
from turnout.moe.capacity import drop_over_capacity


@given(routings(), st.integers(0, 4))
def test_as_in_the_reference(routing, limit):
    kept, E = drop_over_capacity(routing, limit), routing.num_experts
    stats = Stats.of(routing.expert, kept.expert, routing.weight, E)
    expected = reference.load_stats(routing.expert, kept.expert, E)
    assert stats.tokens_per_expert.tolist() == expected["tokens_per_expert"]
    for name in ("dropped", "entropy", "imbalance"):
        assert getattr(stats, name).item() == pytest.approx(expected[name], abs=1e-6), name
    assert not stats.nonfinite


def test_by_hand():
    chosen = torch.tensor([[0, 1], [0, 2], [0, 1], [0, -1]])
    kept = torch.tensor([[0, 1], [0, 2], [-1, 1], [-1, -1]])
    stats = Stats.of(chosen, kept, torch.ones(4, 2), 4)
    assert stats.tokens_per_expert.tolist() == [4, 2, 1, 0]
    assert stats.dropped.item() == pytest.approx(2 / 7)
    assert stats.imbalance.item() == pytest.approx(4 * 4 / 7)
    assert 0 < stats.entropy < 1


def test_extremes():
    even = torch.arange(8).remainder(4).unsqueeze(1)
    stats = Stats.of(even, even, torch.ones(8, 1), 4)
    assert (stats.dropped, stats.entropy, stats.imbalance) == (0, 1, 1)
    one = torch.full((8, 1), 3)
    stats = Stats.of(one, torch.full_like(one, -1), torch.ones(8, 1), 4)
    assert (stats.dropped, stats.entropy, stats.imbalance) == (1, 0, 4)
    none = even[:0]
    stats = Stats.of(none, none, torch.ones(0, 1), 4)
    assert (stats.dropped, stats.entropy, stats.imbalance) == (0, 0, 0)
    single = Stats.of(torch.zeros_like(even), torch.zeros_like(even), torch.ones(8, 1), 1)
    assert single.imbalance == 1
    assert single.entropy.isfinite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_weights(bad):
    expert = torch.zeros(3, 1, dtype=torch.int64)
    assert Stats.of(expert, expert, torch.tensor([[1.0], [bad], [0.0]]), 2).nonfinite


def test_of_a_layer():
    layer = MoE(6, 4, 4, capacity=Capacity(1.0, drop="position"))
    with pytest.raises(RuntimeError, match="no statistics yet"):
        layer.stats.dropped.item()
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[:2] = torch.tensor([[2.0], [1.0]])  # every token of positive sum wants 0, then 1
    layer(torch.ones(8, 6))
    assert layer.stats.tokens_per_expert.tolist() == [8, 8, 0, 0]
    assert layer.stats.dropped == 0.5  # 4 rows an expert
    assert layer.stats.imbalance == 2
    assert layer.stats.entropy.item() == pytest.approx(0.5)
    layer(torch.ones(8, 6), mask=torch.arange(8) < 3)
    assert layer.stats.tokens_per_expert.tolist() == [3, 3, 0, 0]
    assert layer.stats.dropped == 0
