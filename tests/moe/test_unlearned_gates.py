"""Random and hash gates, which learn nothing: their tables, their distributions, no losses."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routed import drawn, even_within, is_a_routing
from turnout.moe import Balance, MoE, aux_loss
from turnout.moe.gates import HashGate, RandomGate
from turnout.moe.gates.gate import distinct
from turnout.moe.gates.hash import hashed, mixed

D, H, E, T = 6, 5, 6, 13


def test_distinct_takes_every_choice_equally_often():
    draws = torch.tensor(list(itertools.product(range(5), range(4), range(3))))
    chosen = [tuple(row) for row in distinct(draws).tolist()]
    assert sorted(chosen) == sorted(itertools.permutations(range(5), 3))


def test_hash_is_splitmix64():
    def step(z):
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    assert step(1234567) == 6457827717110365317  # the published test vector
    values = [0, 1, -1, 1234567, 2**63 - 1, -(2**63)]
    assert [z % 2**64 for z in mixed(torch.tensor(values)).tolist()] == [step(z % 2**64) for z in values]


def test_the_hash_table_never_changes():  # trained experts depend on it
    table = [[1, 5], [0, 5], [5, 2], [1, 5], [3, 2], [3, 7]]
    assert hashed(torch.tensor([0, 1, 2, 255, 50256, -1]), 8, 2).tolist() == table
    assert hashed(torch.tensor([0, 1, 2]), 8, 2, seed=1).tolist() != table[:3]


@pytest.mark.parametrize(("E", "k"), [(2, 1), (8, 1), (8, 3), (64, 2), (5, 5)])
@pytest.mark.parametrize("stride", [1, 4096])
def test_hash_spreads_ids_evenly(E, k, stride):
    expert = hashed(torch.arange(20000) * stride, E, k, seed=5)
    for choice in expert.unbind(1):
        assert even_within(torch.bincount(choice, minlength=E))
    if k > 1:
        first, second = expert[:, 0], expert[:, 1]
        pairs = torch.bincount(first * E + second, minlength=E * E)
        assert even_within(pairs[~torch.eye(E, dtype=torch.bool).flatten()])
    seeds = torch.stack([hashed(torch.arange(20000), E, 1, seed=s).squeeze(1) for s in (5, 6)])
    assert even_within(torch.bincount(seeds[0] * E + seeds[1], minlength=E * E))


def test_hash_looks_at_ids_alone():
    gate, ids = HashGate(D, E, 2), torch.arange(T).remainder(4)
    routing, again = gate(drawn(T, D), ids), gate.eval()(drawn(T, D, seed=1), ids)
    assert torch.equal(routing.expert, again.expert)
    assert torch.equal(routing.expert[:4], routing.expert[4:8])
    assert (routing.weight == 0.5).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("k", [1, 2, E])
def test_random_spreads_tokens_evenly(k, training):
    torch.manual_seed(0)
    gate = RandomGate(D, E, k).train(training)
    routing = gate(torch.zeros(6000, D))
    is_a_routing(routing, 6000, k, E)
    assert (routing.weight == 1 / k).all()
    assert (routing.scores == torch.tensor(1 / E)).all()
    for choice in routing.expert.unbind(1):
        assert even_within(torch.bincount(choice, minlength=E))
    again = gate(torch.zeros(6000, D))
    assert torch.equal(routing.expert, again.expert) is not training


@given(st.integers(1, 9), st.data())
def test_no_expert_twice(E, data):
    k, T, seed = data.draw(st.integers(1, E)), data.draw(st.integers(0, 9)), data.draw(st.integers(-(2**62), 2**62))
    ids = torch.tensor(data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=T, max_size=T)), dtype=torch.int64)
    is_a_routing(HashGate(D, E, k, seed)(torch.zeros(T, D), ids), T, k, E)
    is_a_routing(RandomGate(D, E, k)(torch.zeros(T, D)), T, k, E)


def test_a_gate_without_parameters_adds_no_loss():
    for name in ("random", "hash"):
        layer = MoE(D, H, E, gate=name)
        assert list(layer.gate.parameters()) == []
        layer.gate.reset_parameters()
        layer(drawn(T, D, dtype=torch.float32), ids=torch.arange(T)).sum().backward()
        assert aux_loss(layer) == 0
        layer.balance = Balance(z_loss=1.0)
        with pytest.raises(ValueError, match="returns no logits"):
            layer(drawn(T, D, dtype=torch.float32), ids=torch.arange(T))
