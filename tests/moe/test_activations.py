"""The table of activations, entry by entry: every path computes what its formula says, or refuses it by name."""

import importlib.util

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import close
from turnout.moe import MoE
from turnout.moe.experts.activation import ACTIVATIONS, Activation, Pointwise, activated, weighted
from turnout.moe.experts.feed_forward import FeedForwardExperts
from turnout.moe.experts.triton_path import check_triton

SOFTPLUS = Pointwise(F.softplus, lambda grad, x: grad * x.sigmoid())


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(kind, rows=6, width=5, scale=1.0):
    return [random(rows, width, seed=seed, scale=scale) for seed in range(1 + ACTIVATIONS[kind].gated)]


def exact(kind, up, gate=None):
    return reference.ACTIVATIONS[kind](up, gate)


def test_the_table_has_an_oracle():
    assert ACTIVATIONS.keys() == reference.ACTIVATIONS.keys()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_table_knows_what_triton_has():
    from turnout.cuda import activations

    assert {kind for kind, entry in ACTIVATIONS.items() if entry.triton} == {
        name for name in vars(activations) if name in ACTIVATIONS
    }


@pytest.mark.parametrize("scale", [1.0, 10.0])  # at 10 both ends are clamped
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_values_and_derivatives(kind, scale):
    entry, tensors = ACTIVATIONS[kind], given(kind, scale=scale)
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = exact(kind, *leaves)
    toward = random(*expected.shape, seed=2)
    grads = torch.autograd.grad(expected, leaves, toward)
    for y in (entry(*tensors), activated(entry, *tensors), entry.backward(toward, *tensors)[0]):
        assert close(y, expected, 1e-13)
    for found, wanted in zip(entry.backward(toward, *tensors)[1:], grads, strict=True):
        assert close(found, wanted, 1e-13)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("rows", [0, 1, 6])
def test_first_and_second_derivatives(kind, rows):
    tensors = [t.requires_grad_() for t in given(kind, rows)]
    weight = random(rows, seed=3).requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda *tensors: activated(ACTIVATIONS[kind], *tensors), tensors)
        assert check(weighted, (tensors[0], weight))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_not_a_number_stays_one(kind):
    nan = [torch.full((1, 1), float("nan")) for _ in given(kind)]
    assert activated(ACTIVATIONS[kind], *nan).isnan().all()


@pytest.mark.parametrize("rows", [6, 700])  # 700 rows of 1000 are several blocks
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_in_bfloat16_rounded_once(kind, rows):
    tensors = [t.bfloat16().requires_grad_() for t in given(kind, rows, 1000, scale=3.0)]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    y, expected = activated(ACTIVATIONS[kind], *tensors), exact(kind, *wide)
    toward = random(rows, 1000, seed=2).bfloat16()
    y.backward(toward)
    expected.backward(toward.double())
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) <= 2**-8  # half a unit in the last of 8 places
    for t, w in zip(tensors, wide, strict=True):
        assert relative_error(t.grad, w.grad) <= 2**-8
    if rows == 700 and ACTIVATIONS[kind].gated and kind != "reglu":  # relu rounds nothing
        assert relative_error(ACTIVATIONS[kind](*tensors), expected) > 2**-8


def test_weighting_in_bfloat16_rounds_once():
    up, weight = random(6, 1000).bfloat16(), random(6, seed=2).float()
    expected = up.double() * weight.double().unsqueeze(1)
    assert weighted(up, weight).dtype == torch.bfloat16
    assert relative_error(weighted(up, weight), expected) <= 2**-8
    assert relative_error(up * weight.bfloat16().unsqueeze(1), expected) > 2**-8


def relative_error(actual, expected) -> float:
    return ((actual.double() - expected) / expected).abs()[expected.abs() > 1e-2].max().item()


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_compiled(kind):
    torch._dynamo.reset()
    layer, x = MoE(8, 16, 3, experts=kind, bias=True, shared=1, seed=0), random(9, 8).float()
    results = []
    for forward in (torch.compile(layer, backend="aot_eager", fullgraph=True), layer):
        layer.zero_grad()
        y = forward(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in layer.parameters())])
    for ours, same in zip(*results, strict=True):
        torch.testing.assert_close(ours, same)
    torch._dynamo.reset()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_a_new_entry_needs_no_other_place(few, gated, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "softplus", Activation(SOFTPLUS, gated))
    monkeypatch.setitem(
        reference.ACTIVATIONS, "softplus", lambda up, gate: F.softplus(gate) * up if gated else F.softplus(up)
    )
    monkeypatch.setattr("turnout.moe.experts.feed_forward.pays", lambda *sizes: few)
    experts = FeedForwardExperts(4, 6, 2, "softplus").double()
    rows, weight = random(5, 4).requires_grad_(), random(5, seed=1).abs().requires_grad_()
    tensors = {name: p.detach().clone().requires_grad_() for name, p in experts.named_parameters()}
    y = experts(rows, weight, torch.tensor([2, 3]))
    owner = [0, 0, 1, 1, 1]
    hand = [weight[r] * reference.expert_ffn(rows[r], tensors, e, "softplus") for r, e in enumerate(owner)]
    toward = random(5, 4, seed=2)
    grads = torch.autograd.grad(y, [rows, weight, *experts.parameters()], toward)
    expected = torch.autograd.grad(torch.stack(hand), [rows, weight, *tensors.values()], toward)
    assert close(y, torch.stack(hand), 1e-12)
    for found, wanted in zip(grads, expected, strict=True):
        assert close(found, wanted, 1e-12)


def test_a_path_without_an_entry_refuses_it(monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "softplus", Activation(SOFTPLUS))
    experts = FeedForwardExperts(4, 6, 2, "softplus")
    with pytest.raises(ValueError, match=r"""kernel="triton" has no activation 'softplus'.*: set kernel="torch\""""):
        experts.kernel = "triton"
    with pytest.raises(ValueError, match="no activation 'softplus'"):
        check_triton(torch.zeros(1), "softplus")
