"""Experts that are dropped or merged: the layer computes what a smaller one of these weights computes."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import nn
from turnout.moe import Gate, MoE, aux_loss
from turnout.moe.adapters import add_lora, merge_lora, quantize_experts
from turnout.moe.gates import GATES, CosineGate, TopKGate
from turnout.moe.gates.assignment import assign
from turnout.moe.upcycling import merge_experts, prune_experts
from turnout.moe.upcycling.matching import best_order, matched

X = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
LEARNED = [name for name, kind in GATES.items() if kind.learned and name != "hierarchical"]


def layer(gate: str | Gate = "topk", number: int = 6, **options) -> MoE:
    torch.manual_seed(0)
    return MoE(16, 8, number, gate=gate, **options)


@pytest.mark.parametrize("gate", LEARNED)
@pytest.mark.parametrize("options", [{}, {"shared": 1, "experts": "gelu", "bias": True}], ids=["plain", "shared"])
def test_a_pruned_layer_is_a_smaller_one_with_these_weights(gate, options):
    old = layer(gate, **options)
    kept, weights = [4, 1, 2], {name: t.clone() for name, t in old.state_dict().items()}
    if gate == "sigmoid":
        old.gate.expert_bias.copy_(torch.arange(6) / 50)
        weights["gate.expert_bias"] = old.gate.expert_bias.clone()
    old(X)
    aux_loss(old)
    new = prune_experts(old, kept)
    fresh = layer(CosineGate(16, 3, width=3) if gate == "cosine" else gate, 3, **options)
    fresh.load_state_dict(new.state_dict())
    for name, t in new.state_dict().items():
        by_expert = t.shape != weights[name].shape
        assert by_expert == (name.startswith("experts.") or (name.rpartition(".")[2] in ("weight", "noise_weight",
            "expert_bias") and name.startswith("gate.")))  # fmt: skip
        assert torch.equal(t, weights[name][kept] if by_expert else weights[name]), name
    assert torch.equal(new.eval()(X), fresh.eval()(X))
    new.train()
    fresh.train()
    outputs = []
    for each in (new, fresh):
        torch.manual_seed(2)
        outputs.append(each(X))
        (outputs[-1].sum() + aux_loss(each)).backward()
    assert torch.equal(*outputs)
    assert torch.equal(new.experts.w_up.grad, fresh.experts.w_up.grad)
    assert new.stats.tokens_per_expert.shape == (3,)


def test_experts_without_tokens_are_dropped_without_a_trace():
    old = layer()
    with torch.no_grad():
        old.gate.weight[[0, 3, 5]] = -100.0
    x = X.abs()
    before = old(x)
    unused = old.stats.tokens_per_expert == 0
    assert unused.tolist() == [True, False, False, True, False, True]
    torch.testing.assert_close(prune_experts(old, (~unused).nonzero().flatten().tolist())(x), before)


@pytest.mark.parametrize("experts", ["swiglu", lambda: nn.Linear(16, 16)], ids=["named", "modules"])
def test_equal_experts_merge_without_a_trace(experts):
    old = layer(TopKGate(16, 4, top_k=4), 4, experts=experts)
    with torch.no_grad():
        for t in (*old.experts.parameters(), old.gate.weight):
            t[2:] = t[:2]
    before = old(X)
    old.top_k = 2
    new = merge_experts(old, [[0, 2], [3, 1]], load=torch.tensor([3, 0, 9, 1]))
    torch.testing.assert_close(new(X), before)


@pytest.mark.parametrize("options", [{}, {"experts": "gelu", "bias": True}], ids=["gated", "biases"])
def test_experts_that_differ_in_the_order_of_their_units_merge_without_a_trace(options):
    old = layer(TopKGate(16, 4, top_k=4), 4, **options)
    with torch.no_grad():
        old.gate.weight[2:] = old.gate.weight[:2]
        for name, axis in old.experts.split_axes().items():
            p = getattr(old.experts, name)
            for expert, order in {2: [3, 0, 7, 1, 2, 6, 5, 4], 3: [1, 2, 3, 4, 5, 6, 7, 0]}.items():
                p[expert] = (
                    p[expert - 2] if name == "b_down" else p[expert - 2].index_select(axis - 1, torch.tensor(order))
                )
    before = old(X)
    old.top_k = 2
    torch.testing.assert_close(merge_experts(old, [[0, 2], [3, 1]])(X), before)


def test_units_are_matched_by_the_best_order_of_all():
    experts = layer(number=2).experts
    first = {name: p.detach()[0] for name, p in experts.named_parameters()}

    def like_the_first(own: dict[str, torch.Tensor]) -> float:
        return float(sum((first[name] * own[name]).sum() for name in first))

    own = {name: p.detach()[1] for name, p in experts.named_parameters()}
    found = like_the_first(matched(experts, 0, 1))
    orders = torch.tensor([*permutations(range(8))])
    gain = sum(own[name] @ first[name].T if name == "w_down" else own[name].T @ first[name] for name in first)
    best = gain[orders, torch.arange(8)].sum(1).max()
    assert found == pytest.approx(float(best), rel=1e-5)
    assert found > like_the_first(own) + 0.1


@pytest.mark.parametrize("drawn", [torch.randn, lambda n, m, generator: torch.randint(3, (n, m), generator=generator)])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 60])
def test_the_best_order_is_the_exact_assignment(drawn, n):
    gain = drawn(n, n, generator=torch.Generator().manual_seed(n)).double()
    row, column = torch.arange(n), best_order(gain)
    assert torch.equal(column.sort().values, row)
    exact = assign(gain) if n else column  # of tokens to experts, each of which takes one
    assert float(gain[row, column].sum()) == pytest.approx(float(gain[row, exact].sum()), abs=1e-6)


def test_weights_that_are_not_finite_have_an_order_as_well():
    gain = torch.full((3, 3), torch.nan)
    gain[0, 1], gain[1, 1] = 2.0, torch.inf
    assert int(best_order(gain)[0]) == 1


def test_a_merged_expert_is_the_mean_by_load():
    old = layer(experts=lambda: nn.Linear(16, 16))  # whose units are not matched
    before = {name: t.clone() for name, t in old.state_dict().items()}
    new = merge_experts(old, [[5], [0, 3], [1, 2]], load=torch.tensor([3, 0, 0, 1, 7, 7]))
    for name, t in new.state_dict().items():
        was = before[name]
        assert torch.equal(t[0], was[5])
        torch.testing.assert_close(t[1], 0.75 * was[0] + 0.25 * was[3])
        torch.testing.assert_close(t[2], 0.5 * (was[1] + was[2]))  # no load at all


class Odd(TopKGate):
    """A gate with rows that only it knows."""

    def __init__(self) -> None:
        super().__init__(16, 6, 2)
        self.more = nn.Parameter(torch.zeros(6))


def four_bits() -> MoE:
    return quantize_experts(MoE(64, 64, 6))


@pytest.mark.parametrize(
    ("make", "keep", "message"),
    [
        (lambda: layer("hash"), [0, 1, 2], "HashGate has no rows of a router to drop"),
        (lambda: layer("random"), [0, 1, 2], "RandomGate has no rows of a router to drop"),
        (lambda: layer("hierarchical"), [0, 1, 2], "HierarchicalGate chooses groups of experts first"),
        (lambda: layer(TopKGate(16, 6, groups=3, top_groups=2)), [0, 1], "chooses among groups=3 of equal size"),
        (lambda: layer(free=("null",)), [0, 1, 2], "its gate also chooses free experts"),
        (lambda: add_lora(layer(), rank=2), [0, 1, 2], "it has adapters: call merge_lora"),
        (four_bits, [0, 1, 2], "its experts are in 4 bits: prune before quantize_experts"),
        (lambda: layer(Odd()), [0, 1, 2], "Odd has more: it is unknown which rows"),
        (layer, [1], "1 experts are fewer than top_k=2: keep more"),
        (layer, [0, 6], "must be different integers from 0 to 5; got"),
        (layer, [2, 2], "must be different integers from 0 to 5; got"),
        (layer, [], "there must be one group of experts or more"),
    ],
)
def test_what_cannot_be_pruned_is_refused_by_name(make, keep, message):
    old = make()
    before = {name: t.clone() for name, t in old.state_dict().items() if isinstance(t, torch.Tensor)}
    with pytest.raises(ValueError, match=message):
        prune_experts(old, keep)
    assert old.num_experts == 6
    for name, t in before.items():
        assert torch.equal(t, old.state_dict()[name])


def test_a_load_of_another_layer_is_refused():
    with pytest.raises(ValueError, match="load must be the tokens of 6 experts, 0 or more"):
        merge_experts(layer(), [[0], [1]], load=torch.ones(5))


def test_merged_adapters_are_pruned_with_the_experts():
    old = merge_lora(add_lora(layer(), rank=2), keep=False)
    assert prune_experts(old, [0, 1]).num_experts == 2
