"""Derivatives that are not backward's: forward mode, `torch.func`, batched gradients. Right, or refused by name."""

import copy

import pytest
import torch
from reference import close
from routed import built
from torch import nn
from torch.autograd import forward_ad
from turnout.dispatch import OverlapDispatcher, Plan
from turnout.dispatch.reorder import decode, encode, encode_weight, permute
from turnout.moe import Capacity, MoE, Residual
from turnout.moe.adapters import add_lora
from turnout.moe.gates import GATES, TopKGate

D = 8
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own use


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, D))


LAYERS = {
    "gelu": {"experts": "gelu", "bias": True},
    "swiglu": {"bias": True},
    "weighted before": {"hidden": 4, "bias": True},
    "clamped": {"experts": "clamped_swiglu"},
    "capped": {"capacity": 0.8},
    "padded": {"capacity": Capacity(1.0, pad=True)},
    "shared": {"shared": Residual(1)},
    "free": {"free": ["identity", "constant"], "weight_on": "input"},
    "modules": {"experts": perceptron},
    "adapters": {"adapters": True},
    "recomputed": {"recompute": True},
    "few at a time": {"few": True, "bias": True},
    "few at a time, gelu": {"few": True, "experts": "gelu"},
    "overlapped": {"chunks": 2},
    **{gate: {"gate": gate} for gate in GATES},
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request, monkeypatch):
    options = {"hidden": 16} | copy.deepcopy(request.param)
    few, chunks = options.pop("few", False), options.pop("chunks", 0)
    adapters, recompute = options.pop("adapters", False), options.pop("recompute", False)
    weight_on = options.pop("weight_on", "output")
    monkeypatch.setattr("turnout.moe.experts.feed_forward.pays", lambda *sizes: few)
    torch.manual_seed(0)
    layer = MoE(D, options.pop("hidden"), 4, seed=0, **options)
    layer.experts.recompute, layer.experts.weight_on = recompute, weight_on
    if chunks:
        layer.dispatcher = OverlapDispatcher(layer.dispatcher, chunks)
    if adapters:
        add_lora(layer, 2)
        nn.init.normal_(layer.experts.lora["default"]["up"].b)
    built(layer.double().gate)
    return layer.eval()


def function(layer):
    ids = torch.arange(6)
    return lambda x: layer(x, ids=ids)


def by_differences(f, x, v):
    return (f(x + 1e-5 * v) - f(x - 1e-5 * v)) / 2e-5


def test_forward_mode(layer):
    f, x, v = function(layer), random(6, D), random(6, D, seed=1)
    with torch.no_grad():
        wanted = by_differences(f, x, v)
    assert wanted.any()
    y, tangent = torch.func.jvp(f, (x,), (v,))
    assert close(y, f(x), 1e-12)
    assert close(tangent, wanted, 1e-6)
    with forward_ad.dual_level():
        y = f(forward_ad.make_dual(x, v))
        assert close(forward_ad.unpack_dual(y).tangent, wanted, 1e-6)
    leaf = x.clone().requires_grad_()  # backward through a forward-mode derivative
    torch.func.jvp(f, (leaf,), (v,))[1].square().sum().backward()
    with torch.no_grad():
        along = sum(torch.func.jvp(f, (x + s * v,), (v,))[1].square().sum() * s for s in (1e-4, -1e-4)) / 2e-8
    assert close((leaf.grad * v).sum(), along, 1e-4)


def test_forward_mode_in_parameters(layer):
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    values = {name: layer.get_parameter(name).detach() for name in names}
    tangents = {name: random(*p.shape, seed=i) for i, (name, p) in enumerate(values.items())}
    x = random(6, D)

    def f(values):
        return torch.func.functional_call(layer, values, (x,), {"ids": torch.arange(6)})

    with torch.no_grad():
        moved = [f({n: p + s * tangents[n] for n, p in values.items()}) for s in (1e-6, -1e-6)]
    wanted = (moved[0] - moved[1]) / 2e-6
    assert wanted.any()
    assert close(torch.func.jvp(f, (values,), (tangents,))[1], wanted, 1e-5)


def test_batched_gradients(layer):
    x = random(6, D).requires_grad_()
    y = function(layer)(x)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    grads = random(3, 6, D, seed=1)
    options = {"retain_graph": True, "allow_unused": True}
    each = [torch.autograd.grad(y, leaves, grad, **options) for grad in grads]
    batched = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, **options)
    assert x.grad is None
    assert batched[0].any()
    for found, *wanted in zip(batched, *each, strict=True):
        assert (found is None) == (wanted[0] is None)
        if found is not None:
            assert close(found, torch.stack(wanted), 1e-11)


@pytest.mark.parametrize("options", [{}, {"experts": "gelu", "bias": True}, {"hidden": 4}], ids=str)
@pytest.mark.parametrize("jacobian", [torch.func.jacrev, torch.func.jacfwd])
def test_jacobians(jacobian, options):
    layer, x = (
        MoE(D, **{"hidden": 16, "num_experts": 4, "seed": 0, "balance": 0} | options).double(),
        random(3, D),
    )
    wanted = torch.autograd.functional.jacobian(layer, x)
    assert close(jacobian(layer)(x), wanted, 1e-11)


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
def test_gradients_of_a_function(recompute):
    layer, x = MoE(D, 16, 4, seed=0, balance=0).double(), random(6, D)
    layer.experts.recompute = recompute
    leaf = x.clone().requires_grad_()
    layer(leaf).square().sum().backward()
    assert close(torch.func.grad(lambda x: layer(x).square().sum())(x), leaf.grad, 1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
def test_forward_mode_compiled():
    torch._dynamo.reset()
    layer = MoE(D, 16, 4, gate=TopKGate(D, 4, 2), seed=0)
    x, v = (random(6, D, seed=seed).float() for seed in (0, 1))

    def tangent(x, v):
        return torch.func.jvp(layer, (x,), (v,))[1]

    assert close(torch.compile(tangent, backend="eager")(x, v), tangent(x, v), 1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_the_dtypes_of_training(dtype):
    layer, x, v = MoE(D, 16, 4, bias=True, seed=0).to(dtype), random(6, D).to(dtype), random(6, D, seed=1).to(dtype)
    exact = copy.deepcopy(layer).double()
    tangent = torch.func.jvp(layer, (x,), (v,))[1]
    assert tangent.dtype == dtype
    assert close(tangent, torch.func.jvp(exact, (x.double(),), (v.double(),))[1], 4 * torch.finfo(dtype).eps)


def test_operators():
    plan = Plan.of(torch.tensor([[2, 0], [0, -1], [1, 2]]), 3)
    order = torch.tensor([2, 0, 1, 3, 5, 4])
    x, weight, rows = random(3, 4), random(3, 2, seed=1), random(6, 4, seed=2)
    for f, given in (
        (lambda x: encode(x, plan), (x,)),
        (lambda weight: encode_weight(weight, plan), (weight,)),
        (lambda rows: decode(rows, plan), (rows,)),
        (lambda rows, weight: decode(rows, plan, weight), (rows, weight)),
        (lambda rows: permute(rows, order, order.argsort()), (rows,)),
    ):
        tangents = tuple(random(*t.shape, seed=7 + i) for i, t in enumerate(given))
        moved = [f(*(t + s * v for t, v in zip(given, tangents, strict=True))) for s in (1e-5, -1e-5)]
        y, tangent = torch.func.jvp(f, given, tangents)
        assert close(y, f(*given), 1e-13)
        assert close(tangent, (moved[0] - moved[1]) / 2e-5, 1e-8)
        assert tangent.any()


def test_triton_refuses_forward_mode():
    layer, x = MoE(D, 16, 4, seed=0), random(6, D).float()
    layer.experts.kernel = "triton"
    with pytest.raises(
        NotImplementedError, match=r'kernel="triton" works in neither torch.func nor forward mode: set kernel="torch"'
    ):
        torch.func.jvp(layer, (x,), (x,))
