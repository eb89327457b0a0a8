"""Experts that are switched off by logits of -inf, from a router's bias or a gate of one's own: no NaN anywhere."""

import pytest
import torch
from reference import close
from routed import drawn
from turnout.moe import Balance, MoE, aux_loss
from turnout.moe.gates import GATES
from turnout.moe.gates.assignment import sinkhorn
from turnout.moe.gates.noisy_topk import chosen_chance

D, E, T = 6, 8, 20
LEARNED = [name for name, gate in GATES.items() if gate.learned]
EVEN = {"base", "expert_choice"}  # loads are even by construction, and what is switched off weighs nothing
OFF = {"one": [1], "a group of the hierarchical gate": [0, 1, 2, 3], "all but k": ..., "more than that": ...}


def layer_of(name, off, where):
    gate = GATES[name](D, E, bias=True) if where == "bias" else GATES[name](D, E)
    chosen = torch.zeros(E, dtype=torch.bool)
    chosen[{"all but k": slice(gate.top_k, None), "more than that": slice(1, None)}.get(off, OFF[off])] = True
    with torch.no_grad():
        for seed, p in enumerate(gate.parameters()):
            p.copy_(drawn(*p.shape, seed=seed))
        if where == "bias":
            gate.bias[chosen] = -torch.inf
    layer = MoE(D, 5, E, gate=gate, seed=0, balance=Balance(1.0, z_loss=0.1)).double()
    if where == "logits":
        own = gate.logits
        gate.logits = lambda x: own(x).masked_fill(chosen, -torch.inf)
    return layer, chosen


BIASED = [name for name in LEARNED if name not in ("cosine", "hierarchical")]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize(
    ("name", "where"), [*((name, "bias") for name in BIASED), *((name, "logits") for name in LEARNED)]
)
def test_no_nan_in_outputs_losses_or_gradients(name, where, off, training):
    layer, chosen = layer_of(name, off, where)
    layer.train(training)
    x = drawn(T, D).requires_grad_()
    torch.manual_seed(0)
    y = layer(x)
    loss = aux_loss(layer)
    (y.sin().sum() + loss).backward()
    assert y.isfinite().all()
    assert y.any()
    assert loss.isfinite()
    for of, grad in {"x": x.grad, **{n: p.grad for n, p in layer.named_parameters() if p.grad is not None}}.items():
        assert grad.isfinite().all(), of
    routing = layer.gate(x)
    weight = torch.zeros(T, E, dtype=torch.float64).scatter_add(1, routing.expert.clamp(min=0), routing.weight)
    assert not weight[:, chosen].any()  # no token has anything of them
    live = E - int(chosen.sum())
    picked = layer.top_k if name != "hierarchical" else max(layer.top_k, 4)  # groups picked give equally many
    if name not in EVEN and live >= picked:
        assert not layer.stats.tokens_per_expert[chosen].any()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_load_expected_is_that_without_the_experts_that_are_off(k):
    """With k = 3 as many experts are left as are chosen: each is sure of every token."""
    on = [0, 2, 3]
    logits, noise = drawn(T, 5), drawn(T, 5, seed=1)
    deviation = drawn(T, 5, seed=2).abs() + 0.1
    off = logits.clone()
    off[:, [1, 4]] = -torch.inf
    off.requires_grad_()
    wide = deviation.clone().requires_grad_()
    chance = chosen_chance(off, off + noise * wide, wide, k)
    assert not chance[:, [1, 4]].any()
    chance.sin().sum().backward()
    assert off.grad.isfinite().all()
    assert wide.grad.isfinite().all()
    if k == 3:
        assert (chance[:, on] == 1).all()
        assert not wide.grad.any()
        return
    few, narrow = logits[:, on].requires_grad_(), deviation[:, on].requires_grad_()
    expected = chosen_chance(few, few + noise[:, on] * narrow, narrow, k)
    expected.sin().sum().backward()
    assert close(chance[:, on], expected, 1e-12)
    assert close(off.grad[:, on], few.grad, 1e-12)
    assert close(wide.grad[:, on], narrow.grad, 1e-12)


def test_the_plan_is_that_without_the_experts_that_are_off():
    logits = drawn(T, 5)
    off = logits.clone()
    off[:, [1, 4]] = -torch.inf
    plan = sinkhorn(off, 8)
    assert (plan[:, [1, 4]] == -torch.inf).all()
    assert close(plan[:, [0, 2, 3]], sinkhorn(logits[:, [0, 2, 3]], 8), 1e-12)
    off[3] = -torch.inf  # a token for which nothing is left takes no part
    rest = torch.arange(T) != 3
    assert close(sinkhorn(off, 8)[rest][:, [0, 2, 3]], sinkhorn(logits[rest][:, [0, 2, 3]], 8), 1e-12)
