"""Half precision: sums over many rows are made in float32, and rounded once."""

import copy

import pytest
import torch
from reference import close
from torch import nn
from turnout.moe import Balance, MoE, Residual, aux_loss
from turnout.moe.adapters import add_lora
from turnout.moe.experts.feed_forward import FeedForwardExperts
from turnout.moe.experts.grouped_mm import _sum_of_segments, _sum_of_spans, grouped_bias
from turnout.moe.gates import SigmoidGate, SwitchGate

HALVES = [torch.bfloat16, torch.float16]
ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.usefixtures("half_units")
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("hidden", "activation"), [(16, "gelu"), (4, "swiglu")])  # the weight behind, and before
def test_gradients_of_biases_of_many_rows(hidden, activation, dtype, autocast, few, monkeypatch):
    """bfloat16 counts to 256, float16 to 2048: a sum of ones in them stands still there."""
    monkeypatch.setattr("turnout.moe.experts.feed_forward.pays", lambda *sizes: few)
    R = 3000
    experts = FeedForwardExperts(8, hidden, 2, activation, bias=True, seed=0)
    experts = experts if autocast else experts.to(dtype)
    rows, weight, counts = random(R, 8, dtype=dtype), torch.ones(R), torch.tensor([R, 0])
    exact = FeedForwardExperts(8, hidden, 2, activation, bias=True).double()
    exact.load_state_dict({name: p.to(dtype).double() for name, p in experts.state_dict().items()})
    exact(rows.double(), weight.double(), counts).sum().backward()
    grads = []
    for _ in range(2):
        experts.zero_grad()
        with torch.autocast("cpu", dtype, enabled=autocast):
            y = experts(rows, weight, counts)
        y.backward(torch.ones_like(y))
        grads.append([p.grad for p in experts.parameters()])
    for (name, p), ours, again in zip(exact.named_parameters(), *grads, strict=True):
        assert close(ours, p.grad, 1e-2), name
        assert torch.equal(ours, again), "in a fixed order"


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


LAYERS = {
    "biases": {"bias": True},
    "router's bias": {"gate": SigmoidGate(8, 2, 1, bias=True)},
    "shared": {"bias": True, "shared": Residual(1)},
    "free": {"free": ["identity", "constant"]},
    "modules": {"experts": perceptron},
    "weight on the way in": {"bias": True, "weight_on": "input"},
    "recomputed": {"bias": True, "recompute": True},
    "adapters": {"bias": True, "lora": True},
}


@pytest.mark.usefixtures("half_units")
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_no_gradient_of_a_layer_stands_still(options):
    options = copy.deepcopy(options)
    recompute, lora = options.pop("recompute", False), options.pop("lora", False)
    weight_on = options.pop("weight_on", "output")
    layers = []
    for dtype in (torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        layer = MoE(8, 8, 2, 1, seed=0, balance=Balance(choices=1), **copy.deepcopy(options))
        layer.experts.recompute, layer.experts.weight_on = recompute, weight_on
        if lora:
            add_lora(layer, 4).requires_grad_()
            nn.init.normal_(layer.experts.lora["default"]["up"].b)
        layers.append(layer.bfloat16().to(dtype))
    x = random(4000, 8, dtype=torch.bfloat16).abs()
    for layer in layers:
        dtype = next(layer.parameters()).dtype
        y = layer(x.to(dtype))
        (y.double().sum() + aux_loss(layer)).backward()
    exact, half = layers
    for (name, wanted), p in zip(exact.named_parameters(), half.parameters(), strict=True):
        assert close(p.grad, wanted.grad, 4e-2), name


@pytest.mark.parametrize("sums", [_sum_of_spans, _sum_of_segments])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_sum_for_each_expert(sums, dtype):
    rows = random(7, 3, dtype=dtype)
    wanted = torch.stack([rows[:2].double().sum(0), rows[:0].double().sum(0), rows[2:5].double().sum(0)])
    rows[5:] = float("nan")  # nobody's
    found = sums(rows, ENDS)
    assert found.dtype == dtype
    assert close(found, wanted, 2 * torch.finfo(dtype).eps)


def test_the_bias_of_each_row():
    bias = random(3, 4).requires_grad_()
    y = grouped_bias(bias, ENDS, 7)
    assert torch.equal(y[:5], bias[[0, 0, 2, 2, 2]])
    assert torch.autograd.gradcheck(lambda b: grouped_bias(b, ENDS, 7)[:5], bias)
    assert torch.autograd.gradgradcheck(lambda b: grouped_bias(b, ENDS, 7)[:5], bias)
    torch.library.opcheck(torch.ops.turnout.grouped_bias.default, (bias, ENDS, 5))
    torch.library.opcheck(torch.ops.turnout.grouped_sum.default, (random(5, 4).requires_grad_(), ENDS))


@pytest.mark.parametrize("dtype", HALVES)
def test_jitter_is_drawn_in_float32(dtype):
    gate = SwitchGate(4, 3, jitter=0.01).to(dtype)
    with torch.no_grad():
        gate.weight.zero_()[:, 0] = 1.0  # each logit is the jittered first number of its token
    torch.manual_seed(0)
    logits = gate(torch.ones(4096, 4, dtype=dtype)).logits[:, 0]
    assert logits.dtype == torch.float32
    assert len(logits.unique()) > 3000
    assert abs(logits.mean().item() - 1) < 3e-4
    assert 0.99 <= logits.min() < 0.9901 < 1.0099 < logits.max() <= 1.01
