"""The losses against the reference, at their extremes, without tokens, and with padding."""

from dataclasses import replace

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import close
from strategies import routings
from turnout.moe import Routing
from turnout.moe.losses import balance_loss, z_loss


def double(routing):
    """The routing with float64 leaves, so that gradients can be compared."""
    scores = routing.scores.double().requires_grad_()
    logits = routing.logits.double().requires_grad_()
    return replace(routing, scores=scores, logits=logits)


def routed(T=12, E=4, k=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=g, dtype=torch.float64).requires_grad_()
    scores = logits.softmax(-1)
    weight, expert = scores.topk(k)
    return Routing(expert, weight, scores, logits)


def same(actual, expected, leaf):
    assert close(actual, expected, 1e-12)
    a, e = torch.autograd.grad(actual, leaf, retain_graph=True)[0], torch.autograd.grad(expected, leaf)[0]
    assert close(a, e, 1e-11)


@given(routings(), st.randoms(use_true_random=False))
def test_as_in_the_reference(routing, chance):
    T, E = routing.scores.shape
    for mask in (None, torch.tensor([chance.random() < 0.6 for _ in range(T)], dtype=torch.bool)):
        masked = double(routing) if mask is None else double(routing).masked(mask)
        args = masked.scores, masked.expert, E, mask
        same(balance_loss(masked), reference.balance_loss(*args), masked.scores)
        same(balance_loss(masked, "global"), reference.balance_loss(*args), masked.scores)
        for choices in {1, routing.expert.shape[1]}:
            first, wanted = balance_loss(masked.first(choices)), reference.balance_loss(*args, choices)
            same(first, wanted, masked.scores)
        same(z_loss(masked), reference.z_loss(masked.logits, mask), masked.logits)
        for sequences in {n for n in (1, 2, 3, 4, T) if n and T % n == 0}:
            expected = reference.balance_loss_sequence(masked.scores, masked.expert, E, sequences, mask)
            same(balance_loss(masked, "sequence", sequences), expected, masked.scores)


def test_what_the_loss_is_made_of_can_be_told_apart():
    routing = routed()
    wrong = routing.scores.flip(1)
    assert not close(balance_loss(routing), reference.balance_loss(wrong, routing.expert, 4), 1e-2)
    half = reference.balance_loss(routing.scores[:6], routing.expert[:6], 4)
    assert not close(balance_loss(routing), half, 1e-3)
    assert not close(balance_loss(routing), balance_loss(routing, "sequence", 3), 1e-3)
    assert not close(z_loss(routing), reference.z_loss(routing.logits[:6]), 1e-3)
    mask = torch.arange(12) < 6
    assert close(balance_loss(routing.masked(mask)), half, 1e-12)


@pytest.mark.parametrize("over", ["local", "global", "sequence"])
def test_extremes(over):
    E = 4
    even = Routing(torch.arange(8).remainder(E).unsqueeze(1), torch.ones(8, 1), torch.full((8, E), 1 / E))
    assert balance_loss(even, over).item() == pytest.approx(1)
    one = Routing(torch.full((8, 1), 2), torch.ones(8, 1), torch.eye(E)[[2] * 8])
    assert balance_loss(one, over).item() == pytest.approx(E)


def test_scores_need_not_sum_to_one():
    routing = routed()
    scaled = replace(routing, scores=routing.scores * torch.arange(1, 13).unsqueeze(1))
    assert close(balance_loss(scaled), balance_loss(routing), 1e-12)


def test_z_loss_by_hand():
    routing = replace(routed(2, 2, 1), logits=torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    log2 = torch.tensor(2.0).log().item()
    assert z_loss(routing).item() == pytest.approx((log2**2 + (1 + log2) ** 2) / 2)


@pytest.mark.parametrize("over", ["local", "global", "sequence"])
@pytest.mark.parametrize("sequences", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_without_tokens_finite_with_a_graph(over, sequences, masked):
    routing = routed(T=0)
    if masked:
        routing = routing.masked(torch.zeros(0, dtype=torch.bool))
    for loss in (balance_loss(routing, over, sequences), z_loss(routing)):
        assert loss.item() == 0
        loss.backward(retain_graph=True)
    assert routing.logits.grad.shape == (0, 4)


@pytest.mark.parametrize("over", ["local", "global", "sequence"])
def test_all_padding(over):
    routing = routed()
    masked = routing.masked(torch.zeros(12, dtype=torch.bool))
    loss = balance_loss(masked, over, 3) + z_loss(masked)
    assert loss.item() == 0
    loss.backward()
    assert not routing.logits.grad.any()


def test_nan_of_padding_stays_out():
    routing = routed()
    bad = torch.arange(12) >= 9
    logits = torch.where(bad.unsqueeze(1), float("nan"), routing.logits.detach()).requires_grad_()
    poisoned = replace(routing, logits=logits, scores=logits.softmax(-1)).masked(~bad)
    clean = routing.masked(~bad)
    for over in ("local", "global", "sequence"):
        assert close(balance_loss(poisoned, over, 3), balance_loss(clean, over, 3), 1e-12)
    assert close(z_loss(poisoned), z_loss(clean), 1e-12)


def test_bad_arguments():
    with pytest.raises(ValueError, match="over must be one of local, global, sequence; got 'all'"):
        balance_loss(routed(), "all")
    with pytest.raises(ValueError, match="z_loss needs router logits"):
        z_loss(replace(routed(), logits=None))
