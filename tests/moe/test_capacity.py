"""The capacity rule: exact limits, whom an expert turns away, and that the others do not notice."""

from dataclasses import replace
from itertools import combinations

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import routings
from turnout.dispatch.plan import load
from turnout.moe import Routing
from turnout.moe.capacity import POLICIES, capacity_limit, drop_over_capacity

limits = st.integers(0, 5)
policies = st.sampled_from(["score", "position", "priority"])


@given(routings(), limits, policies)
def test_kept_as_in_the_reference(routing, limit, policy):
    kept = drop_over_capacity(routing, limit, policy)
    expert, weight = reference.drop(routing.expert, routing.weight, limit, policy, routing.scores)
    assert torch.equal(kept.expert, expert)
    assert torch.equal(kept.weight, weight)


@given(routings(), limits, policies)
def test_experts_keep_what_they_can_and_no_more(routing, limit, policy):
    before = load(routing.expert, routing.num_experts)
    after = load(drop_over_capacity(routing, limit, policy).expert, routing.num_experts)
    assert torch.equal(after, before.clamp(max=limit))


@given(routings(), limits, st.integers(0, 3), policies)
def test_more_capacity_only_adds(routing, limit, more, policy):
    few, many = drop_over_capacity(routing, limit, policy), drop_over_capacity(routing, limit + more, policy)
    assert not ((few.expert >= 0) & (many.expert < 0)).any()


@given(routings(), limits, policies)
def test_the_kept_do_not_change(routing, limit, policy):
    kept = drop_over_capacity(routing, limit, policy)
    stays = kept.expert >= 0
    assert torch.equal(kept.expert[stays], routing.expert[stays])
    assert torch.equal(kept.weight[stays], routing.weight[stays])
    assert not kept.weight[~stays].any()
    assert kept.scores is routing.scores
    assert kept.logits is routing.logits


def pair():
    """Three tokens, two experts; expert 0 is the second choice of the first token and the first of the others."""
    expert = torch.tensor([[1, 0], [0, 1], [0, 1]])
    weight = torch.tensor([[0.2, 0.9], [0.5, 0.1], [0.5, 0.3]])
    return Routing(expert, weight, torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.4, 0.6]]))


@pytest.mark.parametrize(
    ("policy", "limit", "wanted"),
    [
        ("position", 1, [[1, -1], [0, -1], [-1, -1]]),  # first choices first, in token order
        ("position", 2, [[1, -1], [0, 1], [0, -1]]),
        ("score", 1, [[-1, 0], [-1, -1], [-1, 1]]),  # the highest weights
        ("score", 2, [[1, 0], [0, -1], [-1, 1]]),  # of two equal ones the first
        ("priority", 1, [[1, -1], [-1, -1], [0, -1]]),  # the tokens of highest scores, their first choices first
        ("priority", 2, [[1, -1], [0, -1], [0, 1]]),
    ],
)
def test_by_hand(policy, limit, wanted):
    assert drop_over_capacity(pair(), limit, policy).expert.tolist() == wanted


def test_the_policies_differ():
    kept = [drop_over_capacity(pair(), 1, policy).expert for policy in POLICIES]
    assert not any(torch.equal(a, b) for a, b in combinations(kept, 2))


@given(routings(), limits)
def test_of_one_choice_the_highest_score_is_the_highest_weight(routing, limit):
    expert = routing.scores.argmax(1, keepdim=True)
    routing = replace(routing, expert=expert, weight=routing.scores.gather(1, expert))
    assert torch.equal(
        drop_over_capacity(routing, limit, "priority").expert, drop_over_capacity(routing, limit, "score").expert
    )


def test_gradient_of_the_weights_reaches_the_kept_alone():
    routing = pair()
    routing.weight.requires_grad_()
    kept = drop_over_capacity(routing, 1)
    kept.weight.sum().backward()
    assert torch.equal(routing.weight.grad, (kept.expert >= 0).float())


@pytest.mark.parametrize(
    ("factor", "k", "T", "E", "limit"),
    [
        (1.1, 1, 100, 10, 11),  # in floats 11.000000000000002
        (1.25, 2, 64, 8, 20),
        (1.0, 1, 10, 3, 4),
        (0.3, 1, 100, 10, 3),
        (1e-9, 1, 100, 10, 1),
        (1e-9, 1, 0, 10, 0),
        (5.0, 2, 0, 4, 0),
        (2, 2, 6, 4, 6),
        (1e300, 1, 1, 2, 10**300 // 2),
    ],
)
def test_limit(factor, k, T, E, limit):
    assert capacity_limit(factor, k, T, E) == limit


@given(st.integers(1, 400), st.integers(1, 8), st.integers(0, 5000), st.integers(1, 64), st.integers(1, 99))
def test_limit_is_exact(hundredths, k, T, E, least):
    limit = capacity_limit(hundredths / 100, k, T, E)
    assert limit == (max(1, -(-hundredths * k * T // (100 * E))) if T else 0)
    assert limit == reference.capacity_limit(hundredths / 100, k, T, E)
    at_least = capacity_limit(hundredths / 100, k, T, E, least)
    assert at_least == (max(limit, least) if T else 0) == reference.capacity_limit(hundredths / 100, k, T, E, least)


@pytest.mark.parametrize("factor", [0, 0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("T", [0, 8])
def test_bad_factors(factor, T):
    with pytest.raises(ValueError, match="factor must be a positive number"):
        capacity_limit(factor, 1, T, 4)


@pytest.mark.parametrize("least", [0, -1, 1.5, None])
def test_bad_least_capacity(least):
    with pytest.raises(ValueError, match="minimum must be a positive integer"):
        capacity_limit(1.0, 1, 8, 4, least)


def test_bad_policy():
    with pytest.raises(ValueError, match="drop must be one of score, position, priority; got 'random'"):
        drop_over_capacity(pair(), 1, "random")


def test_nobody_to_turn_away():
    none = Routing(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), torch.zeros(0, 3))
    assert drop_over_capacity(none, 0).expert.shape == (0, 2)
