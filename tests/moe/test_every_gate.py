"""What every named gate promises: padding has no part in anything, weights can be scaled, its paper is written down."""

import copy
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import close
from routed import built, drawn
from turnout.moe import Balance, Capacity, MoE, aux_loss
from turnout.moe.capacity import POLICIES
from turnout.moe.gates import GATES

D, H, E = 6, 5, 4
DRAWS = {"switch", "gshard", "noisy_topk", "random"}  # in training


def step(layer, x, mask, ids):
    """One step's numbers by name, the same noise for all."""
    torch.manual_seed(1)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x, mask, ids)
    real = y if mask is None else y[mask]
    ((real * drawn(*real.shape, seed=2)).sum() + (aux := aux_loss(layer))).backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    stats = {name: value.double() for name, value in vars(layer.stats).items()}
    buffers = {name: b.double() for name, b in layer.named_buffers()}
    return {"y": y.detach(), "x": x.grad, "aux": aux.detach(), **grads, **stats, **buffers}


@pytest.mark.parametrize("name", GATES)
@settings(max_examples=8)
@given(data=st.data())
def test_padding_has_no_part_in_anything(name, data):
    T, training, seed = data.draw(st.integers(1, 8)), data.draw(st.booleans()), data.draw(st.integers(0, 99))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=T, max_size=T)), dtype=torch.bool)
    factor, policy = data.draw(st.sampled_from([None, 0.7, 1.5])), data.draw(st.sampled_from(POLICIES))
    balance = Balance(over={"local": 1.0, "sequence": 0.5}, z_loss=0.1 * (name not in ("hash", "random")))
    capacity = None if factor is None else Capacity(factor, drop=policy)
    layer = MoE(D, H, E, gate=name, seed=0, capacity=capacity, balance=balance)
    built(layer.double().gate)
    layer.train(training)
    alone, other = copy.deepcopy(layer), copy.deepcopy(layer)
    x, ids = drawn(T, D, seed=seed), torch.arange(T) * 7
    bad = torch.where(mask.unsqueeze(1), x, float("nan"))
    first, second = step(layer, x, mask, ids), step(other, bad, mask, torch.where(mask, ids, -1))
    assert first.keys() == second.keys()
    for each in first:  # whatever stands in it
        assert torch.equal(first[each], second[each]), each
        assert first[each].isfinite().all(), each
    assert not first["y"][~mask].any()
    assert not first["x"][~mask].any()
    n = int(mask.sum())
    assert first["tokens_per_expert"].sum() <= (E if name == "expert_choice" else layer.top_k) * n
    if name in ("expert_choice", "random") or (training and name in DRAWS):
        return  # those look at how many tokens or which place, padding included
    if factor is not None:  # the same number of places for fewer tokens
        places = capacity.limit(layer.top_k, T, E, training)
        alone.capacity = (places - 0.5) * E / (layer.top_k * max(n, 1))
    without = step(alone, x[mask], None, ids[mask])
    for each in without:
        padded = first[each][mask] if each in ("y", "x") else first[each]
        assert close(padded, without[each], 1e-10), each


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", GATES)
def test_scale_multiplies_the_weights_and_nothing_else(name, training):
    plain, scaled = (built(GATES[name](D, E, scale=scale)).train(training) for scale in (1.0, 2.5))
    more, routings = {"ids": torch.arange(9)} if plain.takes_ids else {}, []
    for gate in (plain, scaled):
        torch.manual_seed(0)
        routings.append(gate(drawn(9, D), **more))
    one, other = routings
    assert close(other.weight, 2.5 * one.weight, 1e-12)
    assert one.weight.any()
    assert torch.equal(one.expert, other.expert)
    assert torch.equal(one.scores, other.scores)
    assert one.losses == other.losses
    assert "scale=2.5" in repr(scaled)
    assert "scale" not in repr(plain)


WITHOUT = {"cosine", "hierarchical", "random", "hash"}  # no logits that are one product


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", sorted(GATES.keys() - WITHOUT))
def test_a_router_bias_is_the_weight_of_one_more_feature_that_is_1(name, training):
    gate, plain = built(GATES[name](D, E, bias=True)), built(GATES[name](D + 1, E))
    assert "bias=True" in repr(gate)
    assert "bias" not in plain.state_dict()
    assert "bias" not in repr(plain)
    with torch.no_grad():
        for own, p in plain.named_parameters():
            more = gate.bias.unsqueeze(1) if own == "weight" else torch.zeros(E, 1)
            p.copy_(torch.cat([gate.get_parameter(own), more], 1))
    x, routings = drawn(9, D), []
    for each, tokens in (gate, x), (plain, torch.cat([x, torch.ones(9, 1)], 1)):
        torch.manual_seed(0)
        routings.append(each.train(training and name != "switch")(tokens))  # its noise is on each feature
    one, other = routings
    assert torch.equal(one.expert, other.expert)
    for ours, wanted in (one.weight, other.weight), (one.scores, other.scores), (one.logits, other.logits):
        assert close(ours, wanted, 1e-12)
    grads = [
        torch.autograd.grad(r.logits.square().sum(), p)[0]
        for r, p in zip(routings, (gate.bias, plain.weight), strict=True)
    ]
    assert close(grads[0], grads[1][:, -1], 1e-11)


def test_a_router_bias_is_as_exact_as_the_weight_and_starts_at_zero():
    gate = GATES["topk"](D, E, bias=True)
    assert not gate.bias.any()
    assert gate.state_dict().keys() == {"weight", "bias"}
    x = drawn(9, D, dtype=torch.bfloat16)
    gate = built(gate).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = gate.logits(x)
    assert torch.equal(logits, torch.nn.functional.linear(x.float(), gate.weight.float(), gate.bias.float()))
    gate.reset_parameters()
    assert not gate.bias.any()


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_who_has_no_router_bias(name):
    with pytest.raises((ValueError, TypeError), match="bias"):
        GATES[name](D, E, bias=True)


@pytest.mark.parametrize("name", GATES)
def test_every_gate_has_its_paper_and_formula(name):
    page = (Path(__file__).parents[2] / "docs" / "explanations" / "gates.md").read_text()
    (row,) = re.findall(rf'^\| `"{name}"` \| (.+) \| (.+) \| (.+) \|$', page, re.MULTILINE)
    papers = set(re.findall(r"arXiv:\d{4}\.\d{5}", row[-1]))
    assert papers
    assert papers <= set(re.findall(r"arXiv:\d{4}\.\d{5}", GATES[name].__doc__)), "the docstring names another"
