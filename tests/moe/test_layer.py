"""The whole layer against the reference: outputs, every gradient, shapes, dtypes, settings, copies, errors."""

import copy

import pytest
import reference
import torch
from reference import close
from torch import nn
from turnout.moe import Balance, Capacity, Gate, MoE, Routing, aux_loss

D, H, E, T = 6, 5, 4, 15


def tokens(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def built(dtype=torch.float64, dim=D, hidden=H, **kwargs):
    layer = MoE(dim, hidden, E, seed=1, **kwargs)
    with torch.no_grad():  # far from even, so that capacity has something to do
        layer.gate.weight.copy_(torch.randn(E, dim, generator=torch.Generator().manual_seed(2)))
        layer.gate.weight[0] += layer.gate.weight[1]
    return layer.to(dtype)


def oracle_of(layer):
    named = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    tensors = {name.removeprefix("experts."): p for name, p in named.items() if name.startswith("experts.")}
    return named, tensors


def reference_of(layer, x, activation="swiglu", swap=False, **kwargs):
    named, tensors = oracle_of(layer)
    if swap:
        tensors = {name: p[[1, 0, *range(2, E)]] for name, p in tensors.items()}
    y = reference.moe(x, named["gate.weight"], tensors, activation, layer.top_k, **kwargs)
    return y, named


CASES = {
    "dropless": {},
    "k=1": {"top_k": 1},
    "k=E": {"top_k": E},
    "k=3": {"top_k": 3},
    "score": {"capacity": 0.8},
    "position": {"capacity": Capacity(0.8, drop="position")},
    "priority": {"capacity": Capacity(0.8, drop="priority")},
    "least": {"capacity": Capacity(0.1, minimum=3)},
    "padded least": {"capacity": Capacity(0.1, minimum=3, pad=True)},
    "padded least, dropless": {"capacity": Capacity(0.1, minimum=T + 2, pad=True)},
    "padded score": {"capacity": Capacity(0.8, pad=True)},
    "padded position": {"capacity": Capacity(0.8, drop="position", pad=True)},
    "padded dropless": {"capacity": Capacity(4.0, pad=True)},
    "one row each": {"capacity": 1e-6, "top_k": 1},
}


ACTIVATIONS = ["swiglu", "gelu", "relu", "gelu_tanh"]


@pytest.mark.parametrize(
    ("case", "activation"),
    [
        (case, act)
        for case in CASES
        for act in (ACTIVATIONS[:3] if "least" not in case and case != "priority" else ACTIVATIONS[3:])
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_as_in_the_reference(case, activation, masked):
    settings = CASES[case]
    layer = built(experts=activation, bias=True, **settings)
    x, exact = tokens(T).requires_grad_(), tokens(T).requires_grad_()
    mask = torch.arange(T) % 4 != 1 if masked else None
    capacity = layer.capacity
    rule = {} if capacity is None else {"capacity_factor": capacity.factor, "policy": capacity.drop}
    rule |= {} if capacity is None else {"min_capacity": capacity.minimum}
    y = layer(x, mask)
    expected, named = reference_of(layer, exact, activation, mask=mask, **rule)
    assert close(y, expected, 1e-12)
    toward = tokens(T, seed=1)
    y.backward(toward)
    expected.backward(toward)
    assert close(x.grad, exact.grad, 1e-11)
    for name, p in layer.named_parameters():
        assert close(p.grad, named[name].grad, 1e-11), name
    assert layer.gate.weight.grad.abs().max() > 1e-3
    assert (layer.stats.dropped > 0) == (capacity is not None and "dropless" not in case)
    assert not close(y, reference_of(layer, exact, activation, swap=True, mask=mask, **rule)[0], 1e-3)


def test_the_settings_compute_different_things():
    x = tokens(T)
    outputs = [
        built(bias=True, **CASES[case])(x)
        for case in ("dropless", "k=1", "k=3", "score", "position", "priority", "least")
    ]
    for i, one in enumerate(outputs):
        assert not any(close(one, other, 1e-3) for other in outputs[:i])
    score, padded = (built(bias=True, **CASES[case])(x) for case in ("score", "padded score"))
    assert close(score, padded, 1e-13)


@pytest.mark.parametrize("balance", ["local", "sequence"])
def test_the_balance_loss_may_count_first_choices_alone(balance):
    layer, every = (built(balance=Balance(over=balance, choices=choices), top_k=3) for choices in (1, None))
    x = tokens(3, 5)
    layer(x)
    _, _, scores, _ = reference.route_topk(x.flatten(0, 1), layer.gate.weight, 3)
    first = scores.argmax(1, keepdim=True)
    wanted = 1e-2 * reference.balance_loss_sequence(scores, first, E, 3 if balance == "sequence" else 1)
    loss = aux_loss(layer)
    assert close(loss, wanted, 1e-12)
    ours, theirs = (torch.autograd.grad(each, layer.gate.weight)[0] for each in (loss, wanted))
    assert close(ours, theirs, 1e-11)
    every(x)
    assert not close(aux_loss(every), loss, 1e-2)


@pytest.mark.parametrize(("gate", "k", "normalize"), [("switch", 1, False), ("gshard", 2, True), ("topk", 2, True)])
def test_gates_by_name(gate, k, normalize):
    layer, x = built(gate=gate).eval(), tokens(T)
    assert layer.top_k == k
    assert close(layer(x), reference_of(layer, x, normalize=normalize)[0], 1e-12)


@pytest.mark.parametrize("case", ["dropless", "score", "padded dropless"])
def test_tokens_may_come_in_any_order(case):
    layer, x = built(**CASES[case]), tokens(T)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    assert close(layer(x[order]), y[order], 1e-12)
    assert not close(layer(x[order]), y, 1e-3)


@pytest.mark.parametrize("case", ["dropless", "score", "padded score"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (2, 3), (2, 0), (0, 3), (2, 3, 2), (1, 1, 1, 1)])
def test_leading_shapes(shape, case):
    layer, x = built(**CASES[case]), tokens(*shape).requires_grad_()
    y = layer(x, torch.ones(shape, dtype=torch.bool))
    assert y.shape == x.shape
    assert close(y, layer(x.reshape(-1, D)).reshape(x.shape), 1e-13)
    (y.square().sum() + aux_loss(layer)).backward()
    assert x.grad.shape == x.shape
    for p in layer.parameters():
        assert p.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_where_torchs_grouped_mm_is_used(dtype):
    layer = built(dtype, dim=8, hidden=16, bias=True)
    x = torch.zeros(0, 8, dtype=dtype, requires_grad=True)
    (layer(x).sum() + aux_loss(layer)).backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_any_strides():
    layer, x = built(balance=0), tokens(5, 3)
    assert close(layer(x.transpose(0, 1)), layer(x).transpose(0, 1), 1e-12)
    y = layer(x.expand(2, 5, 3, D))
    y.sum().backward()
    assert close(y[1], layer(x), 1e-12)


def test_padding_is_zero_and_costs_nobody():
    layer, x = built(), tokens(3, 5)
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    y = layer(x, mask)
    assert not y[~mask].any()
    assert close(y[mask], layer(x)[mask], 1e-12)
    assert close(layer(torch.where(mask.unsqueeze(-1), x, 1e3), mask), y, 1e-12)
    capped = built(capacity=0.8)
    assert not close(capped(x, mask)[mask], capped(x)[mask], 1e-3)  # there is room for more
    assert not layer(x, torch.zeros(3, 5, dtype=torch.bool)).any()


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dim", [6, 8])  # 8 by 16 is what torch's grouped_mm takes
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtype_in_is_dtype_out(dtype, dim, bias):
    layer = built(dtype, dim=dim, hidden=2 * dim, bias=bias)
    x = torch.randn(T, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert close(y, reference_of(layer, x.double())[0], TOLERANCE[dtype])
    assert not close(y, reference_of(layer, x.double(), swap=True)[0], TOLERANCE[dtype])
    y.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [0, 1])
def test_autocast(dtype, shared):
    layer = built(torch.float32, dim=8, hidden=16, shared=shared)
    x = torch.randn(T, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = []
    layer.experts.register_forward_pre_hook(lambda _, args: seen.append(args[0].x.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert seen == [torch.bfloat16]
    assert y.dtype == dtype
    assert close(y, layer.float()(x.float()), 2e-2)
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_autocast_leaves_float64_alone():
    layer, x = built(), tokens(T)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert close(y, reference_of(layer, x)[0], 1e-12)


def test_gradcheck():
    for settings in ({}, {"capacity": Capacity(0.8, pad=True)}, {"shared": 1}):
        layer, x = (
            built(dim=3, hidden=2, balance=0, **settings),
            tokens(5)[:, :3].requires_grad_(),
        )  # each number costs two steps
        names = [name for name, _ in layer.named_parameters()]

        def run(x, *values, layer=layer, names=names):
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(run, (x, *(p.detach().clone().requires_grad_() for p in layer.parameters())))


def test_settings_may_change_between_steps():
    layer, x = built(), tokens(T)
    for k in (1, 3, 2):
        layer.top_k = k
        assert layer.gate.top_k == k
        assert close(layer(x), reference_of(layer, x)[0], 1e-12)
    for factor in (0.5, 1, None, 0.7):
        layer.capacity = factor
        assert close(layer(x), reference_of(layer, x, capacity_factor=factor)[0], 1e-12)
    for k in (0, E + 1):
        with pytest.raises(ValueError, match=f"top_k={k} must be between 1 and num_experts={E}"):
            layer.top_k = k


@pytest.mark.parametrize("train", [None, 2.0])
def test_eval_capacity_factor(train):
    layer, x = built(capacity=Capacity(train, eval_factor=0.5)), tokens(T)
    assert close(layer(x), reference_of(layer, x, capacity_factor=train)[0], 1e-12)
    assert close(layer.eval()(x), reference_of(layer, x, capacity_factor=0.5)[0], 1e-12)
    assert not close(layer(x), reference_of(layer, x, capacity_factor=train)[0], 1e-3)
    layer.capacity = None if train is None else Capacity(train)
    assert close(layer(x), reference_of(layer, x, capacity_factor=train)[0], 1e-12)


def test_shared_experts():
    x = tokens(T)
    layer = built(shared=2, bias=True, experts="gelu")
    up, down = layer.shared.up, layer.shared.down
    assert up.weight.shape == (2 * H, D)
    dense = nn.functional.gelu(x @ up.weight.T + up.bias) @ down.weight.T + down.bias
    assert close(layer(x), reference_of(layer, x, "gelu")[0] + dense, 1e-12)
    assert not close(layer(x), reference_of(layer, x, "gelu")[0], 1e-3)
    made = built(shared=2, experts=lambda: nn.Linear(D, D))
    first, second = made.shared.each
    assert not torch.equal(first.weight, second.weight)
    routed = copy.deepcopy(made)
    routed.shared = None
    assert close(made(x), routed(x) + first(x) + second(x), 1e-12)
    none = torch.zeros(T, dtype=torch.bool)
    assert not made(x, none).any()


def test_experts_and_shared_modules_of_ones_own():
    named = MoE(8, 12, 4, shared=2, seed=1)
    given = MoE(8, 1, 4, gate=named.gate, experts=named.experts, shared=named.shared)
    x = torch.randn(5, 8)
    assert torch.equal(named(x), given(x))
    with pytest.raises(ValueError, match="num_experts=2, but experts has 4"):
        MoE(8, 12, 2, experts=named.experts)
    with pytest.raises(ValueError, match="shared=2 needs experts by name or factory"):
        MoE(8, 12, 4, experts=named.experts, shared=2)


def test_a_gate_of_ones_own():
    class Sigmoid(Gate):
        def forward(self, x):
            logits = self.logits(x)
            weight, expert = logits.sigmoid().topk(self.top_k)
            return Routing(expert, weight, logits.sigmoid(), logits)

    layer, x = MoE(D, H, E, gate=Sigmoid(D, E, 3), seed=0).double(), tokens(T)
    assert layer.top_k == 3
    weight, expert = (x @ layer.gate.weight.T).sigmoid().topk(3)
    each = torch.stack([layer.experts[e](x) for e in range(E)], 1)
    assert close(layer(x), (each.gather(1, expert.unsqueeze(2).expand(-1, -1, D)) * weight.unsqueeze(2)).sum(1), 1e-12)
    (layer(x).sum() + aux_loss(layer)).backward()
    assert layer.gate.weight.grad.any()
    with pytest.raises(ValueError, match="top_k=1, but the gate's is 3"):
        MoE(D, H, E, top_k=1, gate=Sigmoid(D, E, 3))
    with pytest.raises(ValueError, match=r"Sigmoid, the gate of MoE.*, returned scores for 3 experts"):
        MoE(D, H, E, gate=Sigmoid(D, 3)).double()(x)
