"""Gates against the reference, and what each promises besides: precision, randomness, gradients."""

import pytest
import reference
import reference_gates
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import close
from routed import same
from torch import nn
from turnout.moe import Routing
from turnout.moe.gates import GShardGate, SwitchGate, TopKGate
from turnout.moe.gates.gate import jittered, normalised

T, D, E = 17, 6, 5


def tokens(seed=0, dtype=torch.float64, n=T):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def built(gate, dtype=torch.float64):
    with torch.no_grad():
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(7)))
    return gate.to(dtype)


@pytest.mark.parametrize("order", ["softmax_first", "choose_first"])
@pytest.mark.parametrize("normalize", [None, True, False])
@pytest.mark.parametrize("k", [1, 2, E])
def test_topk_as_in_the_reference(k, normalize, order):
    gate, x = built(TopKGate(D, E, k, order=order, normalize=normalize)), tokens().requires_grad_()
    routing = gate(x)
    expert, weight, scores, logits = reference.route_topk(x, gate.weight, k, normalize, order)
    assert torch.equal(routing.expert, expert)
    for actual, expected in [(routing.weight, weight), (routing.scores, scores), (routing.logits, logits)]:
        assert close(actual, expected, 1e-12)
        assert actual.dtype == torch.float64
    seed = tokens(1)[:, :k]
    actual = torch.autograd.grad((routing.weight * seed).sum(), (x, gate.weight))
    expected = torch.autograd.grad((weight * seed).sum(), (x, gate.weight))
    for a, e in zip(actual, expected, strict=True):
        assert close(a, e, 1e-11)


@settings(max_examples=15)
@given(st.data())
def test_topk_in_groups_as_in_the_reference(data):
    groups, size, n = (data.draw(st.integers(1, most)) for most in (4, 3, 5))
    top_groups = data.draw(st.integers(1, groups))
    k, normalize = data.draw(st.integers(1, top_groups * size)), data.draw(st.booleans())
    gate = built(TopKGate(D, groups * size, k, normalize=normalize, groups=groups, top_groups=top_groups))
    x = tokens(data.draw(st.integers(0, 99)), n=n).requires_grad_()
    routing = gate(x)
    wanted = reference_gates.route_softmax_in_groups(x, gate.weight, k, normalize, groups, top_groups)
    assert torch.equal(routing.expert, wanted[0])
    assert same(routing.weight, wanted[1], (x, gate.weight))
    assert same(routing.scores, wanted[2], (x, gate.weight))
    assert all(len(set(row)) <= top_groups for row in (routing.expert // size).tolist())


def test_bad_groups():
    for groups, top_groups in ((0, None), (4, None), (5, 0), (5, 6)):
        with pytest.raises(ValueError, match="must divide num_experts=5"):
            TopKGate(D, E, groups=groups, top_groups=top_groups)
    with pytest.raises(ValueError, match="top_k=2, but top_groups=1 have only 1 experts"):
        TopKGate(D, E, 2, groups=5, top_groups=1)(tokens())


def test_a_router_with_two_experts_swapped_is_told_apart():
    gate, x = built(TopKGate(D, E, 2)), tokens()
    other = gate.weight[[1, 0, *range(2, E)]]
    expert, weight, scores, _ = reference.route_topk(x, other, 2)
    routing = gate(x)
    assert not torch.equal(routing.expert, expert)
    assert not close(routing.scores, scores, 1e-3)
    assert close(routing.weight, weight, 1e-12)  # the weights do not know the experts' names


def test_the_orders_and_normalisation_differ():
    x = tokens()
    raw, normal, late = (
        built(TopKGate(D, E, 2, **kw))(x).weight
        for kw in ({"normalize": False}, {"normalize": True}, {"order": "choose_first"})
    )
    assert not close(raw, normal, 1e-3)
    assert close(normal, late, 1e-12)  # the same numbers: softmax of a part is the part of the softmax, normalised


def test_switch():
    gate, x = built(SwitchGate(D, E)).eval(), tokens()
    routing = gate(x)
    expert, weight, _, _ = reference.route_topk(x, gate.weight, 1, normalize=False)
    assert torch.equal(routing.expert, expert)
    assert close(routing.weight, weight, 1e-12)
    assert routing.weight.max() < 1


@pytest.mark.parametrize("make", [lambda: SwitchGate(D, E), lambda: TopKGate(D, E, 1), lambda: TopKGate(D, E, 2)])
def test_the_router_gets_a_gradient(make):
    gate = built(make()).eval()
    (gate(tokens()).weight * tokens(1)[:, : gate.top_k]).sum().backward()
    assert gate.weight.grad.abs().max() > 1e-3


def test_choosing_one_first_leaves_the_router_without_gradient():  # as its documentation says
    gate = built(TopKGate(D, E, 1, order="choose_first"))
    gate(tokens()).weight.sum().backward()
    assert gate.weight.grad.abs().max() < 1e-12


def test_gshard_in_eval_keeps_both():
    gate, x = built(GShardGate(D, E)).eval(), tokens()
    routing = gate(x)
    expert, weight, scores, logits = reference.route_topk(x, gate.weight, 2, normalize=True)
    assert torch.equal(routing.expert, expert)
    assert close(routing.weight, weight, 1e-12)
    assert close(routing.scores, scores, 1e-12)
    assert close(routing.logits, logits, 1e-12)


def test_gshard_in_training_keeps_the_second_by_its_weight():
    gate, n = built(GShardGate(D, E)).train(), 20000
    torch.manual_seed(0)
    for x in tokens(n=6):
        _, weight, _, _ = reference.route_topk(x.unsqueeze(0), gate.weight, 2, normalize=True)
        routing = gate(x.expand(n, D))
        assert (routing.expert[:, 0] >= 0).all()
        kept = routing.expert[:, 1] >= 0
        p = min(1.0, 2 * float(weight.detach()[0, 1]))
        deviation = (p * (1 - p) / n) ** 0.5
        assert abs(float(kept.double().mean()) - p) <= 5 * deviation + 1e-12
        assert not routing.weight[~kept, 1].any()
        assert close(routing.weight[kept, 1], weight[0, 1].expand(int(kept.sum())), 1e-12)
        assert close(routing.weight[:, 0], weight[0, 0].expand(n), 1e-12)  # not normalised again


def test_jitter_in_training_only():
    gate, x = built(SwitchGate(D, E, jitter=0.1)), tokens()
    gate.train()
    first, second = gate(x).logits, gate(x).logits
    assert not torch.equal(first, second)
    gate.eval()
    exact = reference.route_topk(x, gate.weight, 1)[3]
    assert close(gate(x).logits, exact, 1e-12)
    bound = 0.1 * (x.abs() @ gate.weight.abs().T)
    assert ((first - exact).abs() <= bound + 1e-12).all()


def test_jitter_stays_within_its_bounds():
    torch.manual_seed(0)
    noise = jittered(torch.ones(10000), 0.25)
    assert 0.75 <= noise.min() < 0.76
    assert 1.24 < noise.max() <= 1.25


@pytest.mark.parametrize("make", [lambda: TopKGate(D, E, 2), lambda: GShardGate(D, E), lambda: SwitchGate(D, E)])
def test_eval_is_deterministic(make):
    gate, x = built(make()).eval(), tokens()
    first, second = gate(x), gate(x)
    assert torch.equal(first.expert, second.expert)
    assert torch.equal(first.weight, second.weight)


def test_topk_without_jitter_is_deterministic_in_training():
    gate, x = built(TopKGate(D, E, 2)).train(), tokens()
    assert torch.equal(gate(x).weight, gate(x).weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_float32_under_a_half_model(dtype):
    gate, x = built(TopKGate(D, E, 2), dtype), tokens(dtype=dtype)
    routing = gate(x)
    exact = reference.route_topk(x.double(), gate.weight.double(), 2)[3]
    assert routing.logits.dtype == routing.weight.dtype == routing.scores.dtype == torch.float32
    assert close(routing.logits, exact, 1e-6)
    assert not close(routing.logits.bfloat16(), exact, 1e-6)


def test_logits_are_float32_under_autocast():
    gate, x = built(TopKGate(D, E, 2), torch.float32), tokens(dtype=torch.float32)
    wanted = gate(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.functional.linear(x, gate.weight).dtype == torch.bfloat16, "autocast is off"
        logits = gate(x).logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits, wanted)


def test_nan_stays_visible():
    for gate in (TopKGate(D, E, 2), TopKGate(D, E, 2, order="choose_first"), GShardGate(D, E), SwitchGate(D, E)):
        x = tokens()
        x[3, 2] = float("nan")
        for mode in (True, False):
            weight = built(gate).train(mode)(x).weight
            assert weight[3].isnan().any()
            assert weight[:3].isfinite().all()
    with torch.no_grad():
        gate.weight[1] = float("nan")
    assert gate(tokens()).weight.isnan().any()


def test_normalised():
    weight = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert normalised(weight).tolist() == [[0.25, 0.75], [0.0, 0.0]]


@pytest.mark.parametrize("k", [0, -1, E + 1])
def test_bad_top_k(k):
    with pytest.raises(ValueError, match=f"top_k={k} must be between 1 and num_experts={E}"):
        TopKGate(D, E, k)


def test_bad_arguments():
    with pytest.raises(ValueError, match="switch gate needs top_k=1; got top_k=2"):
        SwitchGate(D, E, 2)
    with pytest.raises(ValueError, match="gshard gate needs top_k=2; got top_k=1"):
        GShardGate(D, E, 1)
    with pytest.raises(ValueError, match="between 1 and num_experts=1"):
        GShardGate(D, 1)
    with pytest.raises(ValueError, match="order must be one of"):
        TopKGate(D, E, order="last")


def test_routing_refuses_what_does_not_fit():
    one, scores = torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"must both be \[T, k\]"):
        Routing(one, torch.zeros(3, 2), scores)
    with pytest.raises(ValueError, match="T=3"):
        Routing(one, torch.zeros(3, 1), scores[:2])
    with pytest.raises(ValueError, match="k=3 choices for each token, but scores has only E=2"):
        Routing(one.expand(3, 3), torch.zeros(3, 3), scores)
    with pytest.raises(TypeError, match="int64"):
        Routing(one.int(), torch.zeros(3, 1), scores)
    with pytest.raises(TypeError, match="float32 or float64"):
        Routing(one, torch.zeros(3, 1).bfloat16(), scores)


def test_no_tokens():
    for gate in (TopKGate(D, E, 2), GShardGate(D, E), SwitchGate(D, E)):
        routing = gate(torch.zeros(0, D))
        assert routing.expert.shape == routing.weight.shape == (0, gate.top_k)
        assert routing.scores.shape == (0, E)
