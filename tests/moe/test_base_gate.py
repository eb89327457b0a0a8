"""The even assignment of largest score, against all others, and the gate that makes it (BASE)."""

import math

import pytest
import reference_gates
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import close
from routed import built, drawn, is_a_routing, same
from turnout.moe import Capacity, MoE, aux_loss
from turnout.moe.gates import BalancedGate
from turnout.moe.gates.assignment import _assign, assign

D, H, E, T = 6, 5, 4, 13
KINDS = ["any", "ties", "leaning", "alike"]


def scores_of(kind, T, E, seed):
    """Leaning: all want expert 0, most of all. Alike: few different tokens, many times each."""
    scores = drawn(T, E, seed=seed)
    if kind == "ties":
        return scores.round()
    if kind == "leaning":
        return 0.01 * scores - 5.0 * torch.arange(E)
    return scores[torch.arange(T) % 3] if kind == "alike" else scores


def loads(expert, E):
    return torch.bincount(expert[expert >= 0], minlength=E)


@given(st.data())
def test_no_even_assignment_scores_more(data):
    E, T = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 7))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=T, max_size=T)), dtype=torch.bool)
    scores = scores_of(data.draw(st.sampled_from(KINDS)), T, E, data.draw(st.integers(0, 99)))
    for real, expert in [(torch.ones(T, dtype=torch.bool), assign(scores)), (mask, assign(scores, mask))]:
        n = int(real.sum())
        assert torch.equal(expert >= 0, real)
        assert n // E <= loads(expert, E).min()
        assert loads(expert, E).max() <= math.ceil(n / E)
        total = scores[real].gather(1, expert[real].unsqueeze(1)).sum()
        assert abs(float(total) - reference_gates.best_even(scores[real])) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_no_round_of_exchanges_gains(kind):  # which is to say that it is best, where all cannot be tried
    T, E = 240, 8
    scores = scores_of(kind, T, E, seed=3)
    expert = assign(scores)
    assert (loads(expert, E) == T // E).all()
    for wrong in (False, True):
        if wrong:  # two tokens change places at a loss: that is seen
            gain = scores[:, expert] - scores.gather(1, expert.unsqueeze(1))  # of token t, were it where u is, [t, u]
            t, u = divmod(int((gain + gain.T).argmin()), T)
            expert[[t, u]] = expert[[u, t]]
        loss = torch.full((E, E), math.inf, dtype=torch.float64)
        for t in range(T):
            e = int(expert[t])
            loss[e] = torch.minimum(loss[e], scores[t, e] - scores[t])
        for via in range(E):
            loss = torch.minimum(loss, loss[:, via : via + 1] + loss[via])
        assert bool(loss.diag().min() < -1e-9) is wrong


def test_what_is_not_finite_and_what_is_little():
    for E in (1, 4):
        for T in (0, 1, 3):
            assert loads(assign(torch.zeros(T, E)), E).max() <= 1 or E == 1
    nothing = torch.full((8, 4), math.nan)
    assert (loads(assign(nothing), 4) == 2).all()
    some = drawn(8, 4)
    some[0], some[1, 2], some[2, 3] = math.nan, math.inf, -math.inf
    expert = assign(some)
    assert (loads(expert, 4) == 2).all()
    assert expert[1] == 2
    assert expert[2] != 3
    assert assign(torch.tensor([[1.7e308, -1.7e308], [0.0, 1e308]], dtype=torch.float64)).tolist() == [0, 1]
    far = torch.tensor([[1e30, -1e30], [0.0, 1.0], [1.0, 0.0], [-1e30, 1e30]])
    assert loads(assign(far), 2).tolist() == [2, 2]
    assert torch.equal(assign(far)[[0, 3]], torch.tensor([0, 1]))


def test_the_operator():
    torch.library.opcheck(_assign, (drawn(5, 3), torch.arange(5) > 1))


def test_the_gate_assigns_in_training_and_is_greedy_in_eval():
    gate, x = built(BalancedGate(D, E, scale=1.5)), drawn(4 * T, D).requires_grad_()
    for training in (True, False):
        gate.train(training)
        routing = gate(x)
        is_a_routing_of_sigmoids(routing)
        logits = x @ gate.weight.T
        best = assign(logits.detach()) if training else logits.argmax(1)
        assert torch.equal(routing.expert, best.unsqueeze(1))
        wanted = 1.5 / (1 + (-logits.gather(1, best.unsqueeze(1))).exp())
        assert same(routing.weight, wanted, (x, gate.weight))
    assert not torch.equal(gate.train()(x).expert, routing.expert)
    with torch.no_grad():
        x[3] = math.nan
    routing = gate(x)
    assert routing.weight[3].isnan()  # to be seen, though
    assert (loads(routing.expert.squeeze(1), E) == T).all()


def is_a_routing_of_sigmoids(routing):
    assert close(routing.scores, routing.logits.sigmoid(), 1e-12)
    shares = routing.scores / routing.scores.sum(1, keepdim=True)
    is_a_routing(type(routing)(routing.expert, routing.weight, shares), 4 * T, 1, E)


@pytest.mark.parametrize("capacity", [{}, {"capacity": Capacity(1.0, pad=True)}], ids=["dropless", "padded"])
def test_in_the_layer_every_expert_has_as_many(capacity):
    layer = MoE(D, H, E, gate="base", seed=0, **capacity).double()
    x, mask = drawn(4 * T, D).requires_grad_(), torch.arange(4 * T) % 4 != 1
    (layer(x).square().sum() + aux_loss(layer)).backward()
    assert layer.stats.tokens_per_expert.tolist() == [T] * E
    assert layer.stats.dropped == 0
    assert aux_loss(layer) == 0
    assert layer.gate.weight.grad.any()
    y = layer(x, mask)
    assert sorted(layer.stats.tokens_per_expert.tolist()) == [9, 10, 10, 10]
    assert not y[~mask].any()


def test_bad_arguments():
    with pytest.raises(ValueError, match="the base gate needs top_k=1; got top_k=2"):
        MoE(D, H, E, 2, gate="base")
