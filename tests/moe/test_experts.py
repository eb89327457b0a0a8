"""Experts over sorted rows: what each computes, and that nobody's rows and empty experts leave no trace."""

import pytest
import torch
from reference import close, expert_ffn
from torch import nn
from torch._subclasses import FakeTensorMode
from turnout.moe.experts.activation import ACTIVATIONS
from turnout.moe.experts.feed_forward import FeedForwardExperts
from turnout.moe.experts.grouped_mm import fits_torch
from turnout.moe.experts.modules import ModuleExperts

NAN = float("nan")
COUNTS = [3, 0, 4, 1]
KINDS = list(ACTIVATIONS)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(dim, dtype=torch.float64, counts=COUNTS, spare=0):
    R = sum(counts) + spare
    weight = random(R, seed=1).abs().to(torch.promote_types(dtype, torch.float32))
    return random(R, dim, dtype=dtype), weight, torch.tensor(counts)


def by_hand(tensors, rows, weight, counts, activation):
    owner = [e for e, n in enumerate(counts) for _ in range(n)]
    out = [weight[r] * expert_ffn(rows[r], tensors, e, activation) for r, e in enumerate(owner)]
    return torch.stack(out) if out else rows[:0]


def tensors_of(experts):
    return {name: p.detach().double().requires_grad_() for name, p in experts.named_parameters()}


@pytest.mark.usefixtures("half_units")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(7, 5), (8, 16)])  # one that torch's grouped_mm does not take, one it does
@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("at_once", [False, True])  # all experts, as on other devices
def test_as_in_the_reference(at_once, activation, size, bias, dtype, monkeypatch):
    monkeypatch.setattr("turnout.moe.experts.feed_forward.pays", lambda *sizes: not at_once)
    experts = FeedForwardExperts(*size, 4, activation, bias, seed=3).to(dtype)
    rows, weight, counts = inputs(size[0], dtype)
    oracle = tensors_of(experts)
    exact = [t.double().requires_grad_() for t in (rows, weight)]
    for t in (rows, weight):
        t.requires_grad_()
    y, expected = experts(rows, weight, counts), by_hand(oracle, *exact, COUNTS, activation)
    tol = TOLERANCE[dtype]
    assert y.dtype == dtype
    assert close(y, expected, tol)
    toward = random(*y.shape, seed=2, dtype=dtype)
    y.backward(toward)
    expected.backward(toward.double())
    assert close(rows.grad, exact[0].grad, tol)
    assert close(weight.grad, exact[1].grad, tol)
    for name, p in experts.named_parameters():
        assert close(p.grad, oracle[name].grad, tol), name
        assert not p.grad[1].any(), "the empty expert gets a gradient of exactly zero"
        if activation not in ("relu", "relu2", "reglu") or name in ("w_down", "b_down"):  # the first may be dead
            assert p.grad[[0, 2, 3]].flatten(1).any(1).all()
    swapped = {name: p[[2, 1, 0, 3]] for name, p in oracle.items()}
    assert not close(y, by_hand(swapped, *exact, COUNTS, activation), tol)
    if bias:
        unbiased = {name: p for name, p in oracle.items() if name.startswith("w_")}
        assert not close(y, by_hand(unbiased, *exact, COUNTS, activation), tol)


@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [0, 0, 0, 6], [6, 0, 0, 0]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_empty_experts(counts, dtype, bias):
    experts = FeedForwardExperts(8, 16, 4, "swiglu", bias).to(dtype)
    rows, weight, sizes = inputs(8, dtype, counts)
    y = experts(rows, weight, sizes)
    assert y.shape == rows.shape
    y.sum().backward()  # an expanded gradient, which torch's grouped_mm would refuse
    for p in experts.parameters():
        assert p.grad.shape == p.shape
        assert p.grad.flatten(1).any(1).tolist() == [n > 0 for n in counts]


@pytest.mark.parametrize("make", ["named", "named float32", "odd", "modules"])
@pytest.mark.parametrize("poison", [NAN, float("inf")])
def test_rows_of_nobody_do_not_leak(make, poison):
    dtype, dim = torch.float32 if make == "named float32" else torch.float64, 7 if make == "odd" else 8
    if make == "modules":
        experts = ModuleExperts(lambda: nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 8)), 4).to(dtype)
    else:
        experts = FeedForwardExperts(dim, 16, 4, "swiglu", bias=True).to(dtype)
    kept = sum(COUNTS)

    def run(filling, filled_weight):
        rows, weight, counts = inputs(dim, dtype, spare=3)
        rows[kept:], weight[kept:] = filling, filled_weight
        rows.requires_grad_()
        weight.requires_grad_()
        experts.zero_grad()
        y = experts(rows, weight, counts)
        toward = random(*y.shape, seed=2, dtype=dtype)
        toward[kept:] = filling  # what decode's backward leaves there is zeros; nothing may depend on it
        y.backward(toward)
        grads = [p.grad.clone() for p in experts.parameters()]
        return y[:kept], rows.grad[:kept], weight.grad[:kept], *grads

    for clean, poisoned in zip(run(0.0, 0.0), run(poison, poison), strict=True):
        assert poisoned.isfinite().all()
        assert torch.equal(clean, poisoned)


def perceptron():
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6))


def test_modules_as_each_alone():
    experts = ModuleExperts(perceptron, 4, seed=5).double()
    rows, weight, counts = inputs(6)
    rows.requires_grad_()
    weight.requires_grad_()
    y = experts(rows, weight, counts)
    toward = random(*y.shape, seed=2)
    grads = torch.autograd.grad(y, [rows, weight, *experts.parameters()], toward)
    single, blocks = [], []
    for e, block in enumerate(rows.split(COUNTS)):
        module = perceptron().double()
        module.load_state_dict({n.removeprefix("module."): p.detach()[e] for n, p in experts.named_parameters()})
        single.append(module)
        blocks.append(module(block))
    expected = torch.cat(blocks) * weight.unsqueeze(1)
    assert close(y, expected, 1e-12)
    assert not close(y, torch.cat([single[0](b) for b in rows.split(COUNTS)]) * weight.unsqueeze(1), 1e-3)
    own = [p for module in single for p in module.parameters()]
    expected_grads = torch.autograd.grad(expected, [rows, weight, *own], toward)
    stacked = [torch.stack(expected_grads[2 + i :: 4]) for i in range(4)]
    for actual, exact in zip(grads, [*expected_grads[:2], *stacked], strict=True):
        assert close(actual, exact, 1e-11)
    assert not any(g[1].any() for g in grads[2:])


def test_modules_without_rows():
    experts = ModuleExperts(perceptron, 4)
    y = experts(torch.zeros(0, 6), torch.zeros(0), torch.zeros(4, dtype=torch.int64))
    y.sum().backward()
    assert y.shape == (0, 6)
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())


def test_buffers_are_each_experts_own():
    experts = ModuleExperts(lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), 4)
    rows, weight, counts = inputs(6, torch.float32, [3, 0, 4, 2])
    experts(rows, weight, counts)
    buffers = dict(experts.named_buffers())
    assert buffers["module.1.num_batches_tracked"].tolist() == [1, 0, 1, 1]
    mean = buffers["module.1.running_mean"]
    assert mean.shape == (4, 6)
    assert not mean[1].any()
    linear = {name: p.double() for name, p in experts.named_parameters()}
    block = rows[3:7].double() @ linear["module.0.weight"][2].T + linear["module.0.bias"][2]
    assert close(mean[2], 0.1 * block.mean(0), 1e-5)
    assert not close(mean[0], mean[2], 1e-2)


def test_bad_modules():
    with pytest.raises(ValueError, match="an expert needs parameters, and ReLU has none"):
        ModuleExperts(nn.ReLU, 4)
    experts = ModuleExperts(lambda: nn.Linear(6, 5), 4)
    with pytest.raises(ValueError, match=r"shape of its input, \(3, 6\); Linear returned \(3, 5\)"):
        experts(*inputs(6, torch.float32))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"experts must be one of gelu, .*clamped_swiglu or a factory; got 'tanh'"):
        FeedForwardExperts(8, 16, 4, "tanh")
    with pytest.raises(TypeError, match=r"tokens are torch.float64 and expert weights are torch.float32"):
        FeedForwardExperts(8, 16, 4)(*inputs(8))


@pytest.mark.parametrize(
    "make",
    [lambda seed: FeedForwardExperts(8, 16, 4, "gelu", True, seed), lambda seed: ModuleExperts(perceptron, 4, seed)],
)
class TestEveryKind:
    def test_an_expert_by_number(self, make):
        experts = make(0)
        dim = 8 if isinstance(experts, FeedForwardExperts) else 6
        rows, _, counts = inputs(dim, torch.float32)
        whole = experts(rows, torch.ones(len(rows)), counts)
        for e, (block, y) in enumerate(zip(rows.split(COUNTS), whole.split(COUNTS), strict=True)):
            assert close(experts[e](block), y, 1e-6)
            assert close(experts[e - 4](block), y, 1e-6)
        assert not close(experts[0](rows), experts[2](rows), 1e-2)
        experts[2](rows).sum().backward()
        for p in experts.parameters():
            assert p.grad.flatten(1).any(1).tolist() == [False, False, True, False]
        with torch.no_grad():
            for p in experts.parameters():
                p[2] = 0
        assert not experts[2](rows).any()
        for outside in (4, -5, 100):
            with pytest.raises(IndexError, match=f"no expert {outside}: ids are 0 to 3"):
                experts[outside]
        assert len(experts) == 4
        assert len(list(experts)) == 4

    def test_seeds(self, make):
        torch.manual_seed(1)
        first, other = make(0), make(1)
        torch.manual_seed(2)
        again = make(0)
        for (name, p), q, r in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q), name
            for e in range(4):
                assert p[e].isfinite().all()
                assert p[e].any()
                assert not torch.equal(p[e], r[e]), name
                assert not any(torch.equal(p[e], p[f]) for f in range(e)), name

    def test_building_leaves_torchs_generator_alone(self, make):
        before = torch.random.get_rng_state()
        make(0)
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_reset_after_meta(self, make):
        with torch.device("meta"):
            experts = make(0)
        assert all(p.is_meta for p in experts.parameters())
        experts = experts.to_empty(device="cpu")
        with torch.no_grad():
            for p in experts.parameters():
                p.fill_(NAN)
        experts.reset_parameters()
        for p, q in zip(experts.parameters(), make(0).parameters(), strict=True):
            assert torch.equal(p, q)


def test_initial_values_are_those_of_linear():
    experts = FeedForwardExperts(16, 64, 3, "swiglu", bias=True)
    for name, fan_in in {"up": 16, "gate": 16, "down": 64}.items():
        for kind in "wb":
            bound = fan_in**-0.5
            assert 0.9 * bound < getattr(experts, f"{kind}_{name}").abs().max() <= bound


def test_an_expert_does_not_depend_on_how_many_there_are():
    few, many = FeedForwardExperts(8, 16, 2, seed=9), FeedForwardExperts(8, 16, 5, seed=9)
    assert torch.equal(few.w_up, many.w_up[:2])


def test_modules_that_cannot_be_stacked_are_refused():
    widths = iter([3, 3, 5, 5, 5])
    with pytest.raises(ValueError, match="experts must have one shape"):
        ModuleExperts(lambda: nn.Linear(4, next(widths)), 4)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

    with pytest.raises(ValueError, match="Tied ties parameters"):
        ModuleExperts(Tied, 2)


def test_torch_on_cuda_takes_up_to_1023_matrices():
    with FakeTensorMode():
        rows, *weights = (torch.empty(*shape, 16, device="cuda").bfloat16() for shape in ((4,), (1023, 16), (1024, 16)))
        assert [fits_torch(rows, weight) for weight in weights] == [True, False]
