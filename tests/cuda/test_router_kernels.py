"""The router's kernels against the router in plain PyTorch, in float64, and against a stable sort for the choice."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import close
from runner import FORWARD, RANDOM, REVERSED, installed
from turnout.moe import Capacity, MoE, aux_loss
from turnout.moe.gates import TopKGate, router
from turnout.moe.gates.router import SCORES, plain, route

TOL = 2e-6


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(device, logits, k, score, normalize, bias=None, grads=("weight", "scores")):
    """Choice, weight, scores and the gradient of the logits."""
    ours = logits.clone().to(device).requires_grad_()
    expert, weight, scores = route(ours, k, score, normalize, None if bias is None else bias.to(device))
    choice = logits if bias is None else scores.detach().cpu() + bias
    assert torch.equal(expert.cpu(), choice.sort(dim=1, descending=True, stable=True).indices[:, :k])
    assert weight.dtype == scores.dtype == torch.float32

    exact = logits.double().requires_grad_()
    wanted_scores = exact.sigmoid() if score == "sigmoid" else exact.softmax(-1)
    wanted = wanted_scores.gather(1, expert.cpu())
    if normalize:
        wanted = wanted / wanted.sum(1, keepdim=True)
    assert close(scores.cpu(), wanted_scores, TOL)
    assert close(weight.cpu(), wanted, TOL)

    seeds = {"weight": drawn(*wanted.shape, seed=1), "scores": drawn(*logits.shape, seed=2)}
    pairs = {"weight": (weight, wanted), "scores": (scores, wanted_scores)}
    actual = sum((pairs[name][0] * seeds[name].to(device)).sum() for name in grads)
    expected = sum((pairs[name][1] * seeds[name]).sum() for name in grads)
    (actual,) = torch.autograd.grad(actual, ours)
    (expected,) = torch.autograd.grad(expected, exact)
    assert close(actual.cpu(), expected, 2e-4)  # a sigmoid near 1 has lost digits of s * (1 - s), here as in torch


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_as_in_plain_pytorch(device, data):
    E = data.draw(st.integers(1, 140))
    k = data.draw(st.integers(1, min(E, 9)) | st.just(min(E, 32)))
    T, seed = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 99))
    logits = data.draw(st.sampled_from([1.0, 10.0])) * drawn(T, E, seed=seed)
    if data.draw(st.booleans()):
        logits = logits.round()  # ties
    bias = data.draw(st.none() | st.just(drawn(E, seed=3)))
    grads = data.draw(st.sampled_from([("weight", "scores"), ("weight",), ("scores",)]))
    check(device, logits, k, data.draw(st.sampled_from(SCORES)), data.draw(st.booleans()), bias, grads)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("E", "k"), [(2, 1), (256, 8), (4096, 16), (9000, 3), (32, 32)])
def test_few_and_many_experts(device, E, k, score):
    for bias in (None, drawn(E, seed=4)):
        check(device, drawn(5, E), k, score, True, bias)


@pytest.mark.parametrize("order", [REVERSED, RANDOM, RANDOM + 1])
def test_in_any_order_of_threads_and_blocks(kernels_on_cpu, order):
    for kernels_on_cpu.order in (FORWARD, order):
        check("cpu", drawn(9, 70).round(), 5, "softmax", True)
        check("cpu", drawn(9, 70), 5, "sigmoid", False, drawn(70, seed=5))


@pytest.mark.parametrize("bias", [None, torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0])])
@pytest.mark.parametrize("score", SCORES)
def test_of_equal_logits_the_lowest_expert_comes_first(device, score, bias):
    logits = torch.tensor([[0.0, -0.0, 2.0, 0.0, 2.0]], device=device)
    expert, _, _ = route(logits, 4, score, bias=None if bias is None else bias.to(device))
    assert expert.tolist() == [[2, 4, 0, 1]]


def test_scores_that_rounding_makes_equal_are_told_apart(device):
    logits = torch.tensor([[30.0, 40.0, 35.0]], device=device)  # sigmoid: 1 in float32
    expert, weight, _ = route(logits, 3, "sigmoid")
    assert expert.tolist() == [[1, 2, 0]]
    assert weight.tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 3, 69])
def test_nan_is_seen_as_in_plain_pytorch(device, place, bad, score, normalize):
    logits = drawn(3, 70)
    logits[1, place] = bad
    expert, weight, scores = (out.cpu() for out in route(logits.to(device), 2, score, normalize))
    wanted, wanted_scores, chosen = plain(logits, None, 2, score == "sigmoid", normalize)
    assert torch.equal(weight.isnan(), wanted.isnan())
    assert torch.equal(scores.isnan(), wanted_scores.isnan())
    assert torch.equal(expert, chosen)
    assert expert[1, 0] == place


def test_all_logits_minus_infinity(device):
    expert, weight, scores = route(torch.full((2, 5), -float("inf"), device=device), 2)
    assert weight.isnan().all()
    assert scores.isnan().all()
    assert expert.tolist() == [[0, 1]] * 2


def test_scores_that_underflow(device):
    logits = torch.full((2, 5), -200.0, device=device, requires_grad=True)
    _, weight, _ = route(logits, 2, "sigmoid", normalize=True)
    weight.sum().backward()
    assert not weight.any()
    assert not logits.grad.any()


def test_a_wrong_gradient_would_be_seen(kernels_on_cpu, monkeypatch):
    right = router._route_backward
    monkeypatch.setattr(router, "_route_backward", lambda *args: right(*args[:5], not args[5]))
    with pytest.raises(AssertionError):
        check("cpu", drawn(9, 20), 3, "softmax", True)


def test_what_has_no_kernel_runs_in_plain_pytorch(kernels_on_cpu):
    route(drawn(2, 40), 33)
    route(drawn(1, router.SHARED_FLOATS + 1), 1)
    route(drawn(2, 5).double(), 2)
    assert kernels_on_cpu.launched == {}
    logits = drawn(2, 40).requires_grad_()
    route(logits, 32)[1].sum().backward()
    assert kernels_on_cpu.launched == {"route": 1, "route_backward": 1}


def test_strides(device):
    logits, bias = drawn(20, 9).to(device), drawn(40, seed=1).to(device)[::2]
    ours, wanted = route(logits.t(), 3, bias=bias), route(logits.t().contiguous(), 3, bias=bias.contiguous())
    assert all(map(torch.equal, ours, wanted))


@pytest.mark.parametrize("score", SCORES)
def test_opcheck(device, score):
    for T in (0, 7):
        logits, bias = drawn(T, 11).to(device).requires_grad_(), drawn(11, seed=1).to(device)
        torch.library.opcheck(router._route, (logits, bias, 3, score == "sigmoid", True))


@pytest.mark.parametrize("options", [{}, {"capacity": Capacity(1.0, pad=True)}], ids=["ragged", "padded"])
@pytest.mark.parametrize("gate", [{}, {"normalize": False}, {"order": "choose_first"}], ids=str)
def test_the_layer(kernels_on_cpu, gate, options):
    layer, x = MoE(16, 8, 6, gate=TopKGate(16, 6, 2, **gate), seed=0, **options), drawn(40, 16)

    def step():
        layer.zero_grad()
        y = layer(x)
        (y.square().mean() + aux_loss(layer)).backward()
        return y, *(p.grad for p in layer.parameters())

    ours = step()
    assert {"plan_count", "plan_place", "route", "route_backward"} <= set(kernels_on_cpu.launched)
    with installed(None):
        plain = step()
    for actual, wanted in zip(ours, plain, strict=True):
        assert close(actual, wanted, 1e-5)
