"""Expert-choice, cosine and sinkhorn gates against the reference; they and the sigmoid gate in the layer."""

import math

import pytest
import ranks
import reference
import reference_gates
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import close
from routed import built, drawn, is_a_routing, same
from torch.distributed.device_mesh import init_device_mesh
from torch.func import functional_call
from turnout.moe import Balance, Capacity, MoE, aux_loss, parallelize
from turnout.moe.gates import CosineGate, ExpertChoiceGate, SigmoidGate, SinkhornGate, TopKGate
from turnout.moe.gates.sinkhorn import sinkhorn

D, H, E, T = 6, 5, 6, 13
NEW = ["sigmoid", "expert_choice", "cosine", "sinkhorn"]


# ---- expert choice


@settings(max_examples=15)
@given(st.data())
def test_expert_choice_as_in_the_reference(data):
    E, T = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 8))
    k = data.draw(st.integers(1, E))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=T, max_size=T)), dtype=torch.bool)
    gate, x = built(ExpertChoiceGate(D, E, k)), drawn(T, D, seed=data.draw(st.integers(0, 99)))
    routing = gate(x, mask).masked(mask)
    pairs = reference_gates.choose_tokens(routing.scores.detach(), math.ceil(k * T / E), mask)
    taken = [(t, int(e)) for t in range(T) for e in routing.expert[t] if e >= 0]
    assert len(taken) == len(set(taken))
    assert set(taken) == pairs
    for t in range(T):
        row = routing.weight[t][routing.expert[t] >= 0]
        assert torch.equal(row, routing.scores[t][routing.expert[t][: len(row)]])  # the rest is -1, behind
        assert torch.equal(row, row.sort(descending=True).values)
    assert not routing.weight[routing.expert < 0].any()


def test_expert_choice_loads_are_even_and_most_keeps_the_heaviest():
    layer, x = MoE(D, H, E, 2, gate="expert_choice", capacity=Capacity(1.0, pad=True), seed=0).double(), drawn(12, D)
    built(layer.gate)
    y = layer(x)
    assert layer.stats.tokens_per_expert.tolist() == [4] * E
    assert layer.stats.dropped == 0
    assert layer.gate(x).expert.shape == (12, E)
    layer.capacity = None
    assert close(layer(x), y, 1e-12)
    full, layer.gate.most = layer.gate(x), 2
    few = layer.gate(x)
    assert torch.equal(few.expert, full.expert[:, :2])
    assert (full.expert[:, 2] >= 0).any()
    assert aux_loss(layer) == 0


def test_expert_choice_is_not_causal_and_sinkhorn_is_in_eval():
    x = drawn(T, D)
    for gate, training, causal in [
        (ExpertChoiceGate(D, E, 2), False, False),
        (SinkhornGate(D, E, 1), True, False),
        (SinkhornGate(D, E, 1), False, True),
        (SigmoidGate(D, E, 2), True, True),
    ]:
        built(gate).train(training)
        later = [gate(torch.cat([x, drawn(T, D, seed=s)])).expert[:T] for s in (1, 2, 3)]
        assert all(torch.equal(each, later[0]) for each in later) is causal


# ---- cosine


@pytest.mark.parametrize("k", [1, 2, E])
def test_cosine_as_in_the_reference(k):
    gate, x = built(CosineGate(D, E, k, width=3)), drawn(T, D).requires_grad_()
    routing = gate(x)
    is_a_routing(routing, T, k, E)
    point = [[(x[t] * row).sum() for row in gate.projection] for t in range(T)]
    logits = torch.stack(
        [
            torch.stack([sum(a * b for a, b in zip(p, e, strict=True)) / length(p) / length(e) for e in gate.weight])
            for p in point
        ]
    )
    logits = logits / gate.temperature
    assert same(routing.logits, logits, (x, *gate.parameters()))
    # with logits for tokens and the identity for a router the reference goes on from there
    expert, weight, _, _ = reference.route_topk(logits, torch.eye(E, dtype=x.dtype), k)
    assert torch.equal(routing.expert, expert)
    assert same(routing.weight, weight, (x, *gate.parameters()), 1e-9)
    assert close(gate(3 * x).logits, routing.logits, 1e-12)  # only directions count


def length(values):
    return sum(v * v for v in values).sqrt()


# ---- sinkhorn


@settings(max_examples=15)
@given(st.data())
def test_sinkhorn_as_in_the_reference(data):
    E, T, iterations = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    mask = torch.tensor([True, *data.draw(st.lists(st.booleans(), min_size=T - 1, max_size=T - 1))])
    logits = drawn(T, E, seed=data.draw(st.integers(0, 99)))
    wanted = reference_gates.sinkhorn(logits, iterations, mask)
    assert close(sinkhorn(logits, iterations, mask)[mask].exp(), wanted[mask], 1e-12)
    gate = built(SinkhornGate(D, E, 1, iterations))
    x = drawn(T, D, seed=data.draw(st.integers(0, 99)))
    routing = gate(x, mask)
    plan = reference_gates.sinkhorn(x @ gate.weight.T, iterations, mask)
    assert close(plan[mask].gather(1, routing.expert[mask]), plan[mask].max(1, keepdim=True).values, 1e-12)
    assert close(routing.weight, routing.scores.gather(1, routing.expert), 1e-12)
    assert torch.equal(gate.eval()(x).expert, (x @ gate.weight.T).argmax(1, keepdim=True))


def test_sinkhorn_balances_what_top_k_does_not():
    x = drawn(600, D) + 0.7
    loads = {}
    for gate in (built(SinkhornGate(D, E, 1)), built(TopKGate(D, E, 1))):
        loads[type(gate)] = torch.bincount(gate(x).expert.flatten(), minlength=E).max() * E / 600
    assert loads[SinkhornGate] < 1.3
    assert loads[TopKGate] > 2


# ---- all of them


def gate_of(name):
    made = {"sigmoid": SigmoidGate, "expert_choice": ExpertChoiceGate, "cosine": CosineGate, "sinkhorn": SinkhornGate}
    return built(made[name](D, E, 2))


@pytest.mark.parametrize("name", NEW)
def test_gradcheck(name):
    gate = gate_of(name)
    names = [n for n, _ in gate.named_parameters()]

    def run(x, *values):
        routing = functional_call(gate, dict(zip(names, values, strict=True)), (x,))
        return routing.weight, routing.scores, routing.logits

    assert torch.autograd.gradcheck(run, (drawn(4, D).requires_grad_(), *gate.parameters()))


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("tokens", [0, 1, T])
def test_in_the_layer_with_padding_and_without_tokens(name, tokens):
    layer = MoE(D, H, E, gate=gate_of(name), seed=0, capacity=float(E), balance=Balance(z_loss=1e-3)).double()
    x, mask = drawn(tokens, D), torch.arange(tokens) % 3 > 0
    x[~mask] = math.nan
    y = layer(x, mask)
    (y[mask].sum() + aux_loss(layer)).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert not y[~mask].any()
    wanted = layer(x[mask]) if name != "expert_choice" else y[mask]  # there capacity counts padding
    assert close(y[mask], wanted, 1e-12)
    if name != "expert_choice":
        assert layer.stats.tokens_per_expert.sum() == 2 * mask.sum()


@pytest.mark.parametrize("name", NEW)
def test_float32_under_bfloat16_and_nan_stays_visible(name):
    gate, x = gate_of(name).bfloat16(), drawn(T, D).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        routing = gate(x)
    wanted = gate.float()(x.float())
    assert routing.weight.dtype == routing.scores.dtype == torch.float32
    assert close(routing.logits, wanted.logits, 1e-5)
    x[3, 2] = math.nan
    routing = gate(x)
    assert routing.scores[3].isnan().any()
    assert routing.weight[3].isnan().any()


def _spread(name):
    layer = MoE(D, H, E, gate=gate_of(name), seed=0, balance=Balance(over="global")).double()
    x = drawn(T, D)
    wanted = layer(x)
    parallelize(layer, init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)))
    y = layer(x)
    (y.sum() + aux_loss(layer)).backward()
    return close(y, wanted, 1e-12), all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("name", NEW)
def test_spread_over_ranks(name):
    assert ranks.run(2, _spread, name) == [(True, True)] * 2


def test_bad_arguments():
    for make, message in [
        (lambda: SigmoidGate(D, E, groups=4), "groups=4 must divide num_experts=6"),
        (lambda: SigmoidGate(D, E, groups=2, top_groups=3), "top_groups=3 must be between 1 and groups=2"),
        (lambda: SigmoidGate(D, E, 3, groups=3, top_groups=1)(drawn(1, D)), "top_k=3, but top_groups=1 have only 2"),
        (lambda: ExpertChoiceGate(D, E, most=7), "most=7 must be between 1 and num_experts=6"),
        (lambda: CosineGate(D, E, temperature=0.0), "temperature=0.0 at least 0.01"),
        (lambda: SinkhornGate(D, E, iterations=0), "iterations must be a positive integer; got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
