"""Noisy top-k and hierarchical gates against the reference; they and those that learn nothing, in the layer."""

import math

import pytest
import ranks
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import close
from routed import drawn, even_within, is_a_routing
from torch.distributed.device_mesh import init_device_mesh
from torch.func import functional_call
from turnout.moe import Balance, MoE, aux_loss, parallelize
from turnout.moe.gates import GATES, HierarchicalGate, NoisyTopKGate
from turnout.moe.gates.noisy_topk import chosen_chance
from turnout.moe.losses import cv_squared

D, H, E, T = 6, 5, 6, 13
NEW = ["noisy_topk", "hierarchical", "random", "hash"]


def built(gate):
    with torch.no_grad():
        for i, p in enumerate(gate.parameters()):
            p.copy_(drawn(*p.shape, seed=7 + i))
    return gate.double()


def route(gate, x, seed=3, **kwargs):
    """The routing, and the noise that went into it."""
    torch.manual_seed(seed)
    noise = torch.randn(len(x), gate.num_experts, dtype=x.dtype)
    torch.manual_seed(seed)
    return gate(x, **kwargs), noise


def gradients(y, leaves, seed=0):
    """Of y against something drawn; zeros where there is no graph."""
    loss = (y * drawn(*y.shape, seed=seed)).sum() + sum(0 * leaf.sum() for leaf in leaves)
    return torch.autograd.grad(loss, leaves, retain_graph=True)


# ---- noisy top-k


@given(st.data())
def test_noisy_as_in_the_reference(data):
    E = data.draw(st.integers(1, 6))
    k, T, seed = data.draw(st.integers(1, E)), data.draw(st.integers(0, 7)), data.draw(st.integers(0, 99))
    mask = data.draw(st.none() | st.lists(st.booleans(), min_size=T, max_size=T).map(lambda m: torch.tensor(m).bool()))
    gate, x = built(NoisyTopKGate(D, E, k)), drawn(T, D, seed=seed).requires_grad_()
    gate.train(data.draw(st.booleans()))
    routing, noise = route(gate, x, seed, mask=mask)
    is_a_routing(routing, T, k, E)
    leaves = (x, gate.weight, gate.noise_weight)
    expected = reference.route_noisy(*leaves, noise if gate.training else None, k, mask=mask)
    assert torch.equal(routing.expert, expected[0])
    pairs = zip((routing.weight, routing.scores, *routing.losses.values()), expected[1:], strict=True)
    for seed, (actual, wanted) in enumerate(pairs):
        assert close(actual, wanted, 1e-11)
        for a, w in zip(*(gradients(y, leaves, seed) for y in (actual, wanted)), strict=True):
            assert close(a, w, 1e-9)


def test_noisy_losses_of_other_noise_or_mask_are_told_apart():
    gate, x = built(NoisyTopKGate(D, E, 2)), drawn(T, D)
    routing, noise = route(gate, x)
    for other in ({"noise": -noise}, {"floor": 0.1}, {"mask": torch.arange(T) < 9}, {"noise": None}):
        wrong = reference.route_noisy(x, gate.weight, gate.noise_weight, **{"noise": noise, "k": 2, **other})
        assert not close(routing.losses["importance"], wrong[3], 1e-3)
        assert not close(routing.losses["load"], wrong[4], 1e-3)


@pytest.mark.parametrize("k", [1, 2, E])
def test_noisy_gradcheck(k):
    gate = built(NoisyTopKGate(D, E, k))

    def run(x, weight, noise_weight):
        torch.manual_seed(3)
        routing = functional_call(gate, {"weight": weight, "noise_weight": noise_weight}, (x,))
        return routing.weight, routing.losses["importance"], routing.losses["load"]

    assert torch.autograd.gradcheck(run, (drawn(4, D).requires_grad_(), gate.weight, gate.noise_weight))


def test_chance_is_how_often_a_new_draw_is_chosen():
    n, k = 20000, 2
    logits, deviation = drawn(1, E), 0.5 + drawn(1, E, seed=1).abs()
    noisy = logits + deviation * drawn(1, E, seed=2)
    chance = chosen_chance(logits, noisy, deviation, k)[0]
    for e in range(E):
        again = noisy.expand(n, E).clone()
        again[:, e] = logits[0, e] + deviation[0, e] * drawn(n, seed=10 + e)
        share = float((again.topk(k).indices == e).any(1).double().mean())
        p = float(chance[e])
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / n) + 1e-6
    assert chance.max() > 0.5 > chance.min()


def test_noise_in_training_only_and_scores_without_it():
    gate, x = built(NoisyTopKGate(D, E, 2)), drawn(T, D)
    first, second = gate(x), gate(x)
    assert not torch.equal(first.weight, second.weight)
    assert torch.equal(first.scores, second.scores)
    assert close(first.logits, x @ gate.weight.T, 1e-12)
    gate.eval()
    assert torch.equal(gate(x).weight, gate(x).weight)


def test_noisy_starts_at_zero_with_equal_loads_and_learns():
    gate = NoisyTopKGate(D, E, 1).double()
    torch.manual_seed(0)
    routing = gate(drawn(6000, D))
    assert even_within(torch.bincount(routing.expert.flatten(), minlength=E))
    assert not gate.weight.any()
    (routing.weight * drawn(6000, 1, seed=1)).sum().backward()
    assert gate.weight.grad.abs().max() > 1e-3
    assert gate.noise_weight.grad.abs().max() > 1e-3


def test_cv_squared_extremes():
    assert cv_squared(torch.full((4,), 3.0)) == 0
    assert cv_squared(torch.tensor([0.0, 0.0, 8.0, 0.0])).item() == pytest.approx(3)
    nothing = torch.zeros(4, requires_grad=True)
    cv_squared(nothing).backward()
    assert not nothing.grad.any()


def test_the_layer_balances_by_the_gates_losses_alone_without_padding():
    layer, x = MoE(D, H, E, gate="noisy_topk", seed=0).double(), drawn(T, D)
    built(layer.gate)
    mask = torch.arange(T) % 3 > 0
    x[~mask] = float("nan")
    torch.manual_seed(3)
    noise = torch.randn(T, E, dtype=x.dtype)
    torch.manual_seed(3)
    layer(x, mask)
    parameters = layer.gate.weight, layer.gate.noise_weight
    expected = reference.route_noisy(x.nan_to_num(), *parameters, noise, 2, mask=mask)
    loss = aux_loss(layer)
    assert close(loss, 1e-2 * (expected[3] + expected[4]), 1e-12)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in parameters)


# ---- hierarchical


@given(st.data())
def test_hierarchical_as_in_the_reference(data):
    groups, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    top_groups, each = data.draw(st.integers(1, groups)), data.draw(st.integers(1, size))
    T, E, k = data.draw(st.integers(0, 6)), groups * size, top_groups * each
    gate = built(HierarchicalGate(D, E, k, groups=groups, top_groups=top_groups))
    x = drawn(T, D, seed=data.draw(st.integers(0, 99))).requires_grad_()
    routing = gate(x)
    is_a_routing(routing, T, k, E)
    leaves = (x, gate.group_weight, gate.weight)
    expert, *expected = reference.route_hierarchical(*leaves, top_groups, each)
    assert torch.equal(routing.expert, expert)
    assert close(routing.logits, x @ gate.group_weight.repeat_interleave(size, 0).T + x @ gate.weight.T, 1e-12)
    for actual, wanted in zip((routing.weight, routing.scores), expected, strict=True):
        assert close(actual, wanted, 1e-12)
        for a, w in zip(*(gradients(y, leaves) for y in (actual, wanted)), strict=True):
            assert close(a, w, 1e-10)


@pytest.mark.parametrize(("k", "top_groups"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_both_levels_get_a_gradient(k, top_groups):
    gate = built(HierarchicalGate(D, E, k, groups=2, top_groups=top_groups))
    (gate(drawn(T, D)).weight * drawn(T, k, seed=1)).sum().backward()
    assert gate.weight.grad.abs().max() > 1e-3
    assert gate.group_weight.grad.abs().max() > 1e-3

    def run(x, weight, group_weight):
        return functional_call(gate, {"weight": weight, "group_weight": group_weight}, (x,)).weight

    assert torch.autograd.gradcheck(run, (drawn(4, D).requires_grad_(), gate.weight, gate.group_weight))


@pytest.mark.parametrize(
    ("E", "k", "groups", "picks"),
    [
        (1, 1, 1, (1, 1)),
        (7, 2, 1, (1, 2)),
        (12, 4, 3, (2, 2)),
        (16, 2, 4, (1, 2)),
        (64, 8, 8, (2, 4)),
        (12, 12, 3, (3, 4)),
    ],
)
def test_hierarchical_defaults(E, k, groups, picks):
    gate = HierarchicalGate(D, E, k)
    assert (gate.groups, gate.picks()) == (groups, picks)


def test_hierarchical_refuses_what_does_not_split():
    with pytest.raises(ValueError, match="groups=4 must divide num_experts=6"):
        HierarchicalGate(D, 6, 2, groups=4)
    with pytest.raises(ValueError, match=r"top_k=4 with top_groups=3: .* use top_groups from \[2\]"):
        HierarchicalGate(D, 6, 4, groups=3, top_groups=3)
    with pytest.raises(ValueError, match=r"top_k=5 with top_groups=None: .* use another top_k or other groups"):
        HierarchicalGate(D, 6, 5, groups=3)
    layer = MoE(D, H, 6, top_k=4, gate="hierarchical")
    with pytest.raises(ValueError, match="another top_k"):
        layer.top_k = 5
    assert layer.top_k == 4


# ---- all of them, in the layer


@pytest.mark.parametrize("gate", NEW)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [0, T])
def test_in_the_layer(gate, masked, tokens):
    layer, x = MoE(D, H, E, 2, gate=gate, seed=0, capacity=2.0).double(), drawn(tokens, D)
    mask = torch.arange(tokens) % 3 > 0 if masked else None
    y = layer(x, mask, torch.arange(tokens))
    assert y.shape == x.shape
    assert layer.stats.tokens_per_expert.sum() == 2 * (tokens if mask is None else int(mask.sum()))
    (y.sum() + aux_loss(layer)).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    if mask is not None:
        assert not y[~mask].any()


@pytest.mark.parametrize("gate", NEW)
def test_weights_are_float32_under_bfloat16_and_autocast(gate):
    layer, ids = MoE(8, 8, E, 2, gate=gate, seed=0).eval(), torch.arange(T)
    x = drawn(T, 8).bfloat16()
    for p in layer.gate.parameters():
        torch.nn.init.uniform_(p, -1, 1)
    layer.gate.takes_ids, more = False, {"ids": ids} if gate == "hash" else {}
    wanted = layer.gate(x.float(), **more)
    with torch.autocast("cpu", torch.bfloat16):
        routing = layer.gate(x.float(), **more)
    half = layer.gate(x, **more)
    for actual in (routing, half):
        assert actual.weight.dtype == actual.scores.dtype == torch.float32
        assert torch.equal(actual.weight, wanted.weight)
        assert torch.equal(actual.expert, wanted.expert)
    layer.gate.takes_ids = gate == "hash"
    assert layer.to(torch.bfloat16).train()(x, ids=ids).dtype == torch.bfloat16


@pytest.mark.parametrize("gate", GATES)
def test_any_gate_may_be_given_ids(gate):
    x, ids = drawn(2, 5, D, dtype=torch.float32), torch.arange(10).reshape(2, 5)
    assert MoE(D, H, E, gate=gate)(x, ids=ids).shape == x.shape


def test_ids_must_fit():
    layer, x = MoE(D, H, E, gate="hash"), torch.randn(2, 5, D)
    with pytest.raises(ValueError, match=r"ids is None: call moe\(x, ids=ids\) with int64 ids"):
        layer(x)
    with pytest.raises(ValueError, match=r"ids must be int64 \(2, 5\); got torch.int64 \(10,\)"):
        layer(x, ids=torch.arange(10))
    with pytest.raises(ValueError, match=r"ids must be int64 \(2, 5\); got torch.int32"):
        layer(x, ids=torch.zeros(2, 5, dtype=torch.int32))
    with pytest.raises(ValueError, match="noise_floor must be positive"):
        NoisyTopKGate(D, E, 2, noise_floor=0)


@pytest.mark.parametrize("gate", NEW)
def test_bad_top_k(gate):
    with pytest.raises(ValueError, match=f"top_k={E + 1} must be between 1 and num_experts={E}"):
        MoE(D, H, E, E + 1, gate=gate)


def _spread(gate):
    torch.manual_seed(0)
    layer, ids = MoE(D, H, 4, 2, gate=gate, balance=Balance(over="global")), torch.arange(T)
    x = drawn(T, D, seed=1, dtype=torch.float32)
    wanted = layer.eval()(x, ids=ids)
    world = torch.distributed.get_world_size()
    parallelize(layer, init_device_mesh("cpu", (world,), mesh_dim_names=("ep",)))
    y = layer(x, ids=ids)
    (layer.train()(x, ids=ids).sum() + aux_loss(layer)).backward()
    return close(y, wanted, 1e-6), all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("gate", NEW)
@pytest.mark.parametrize("world", [1, 2])
def test_spread_over_ranks(gate, world):
    assert ranks.run(world, _spread, gate) == [(True, True)] * world
