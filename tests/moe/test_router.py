"""The router's step in plain PyTorch: its gradients, its choice, its operator."""

import pytest
import torch
from reference import close
from turnout.moe.gates.router import SCORES, _route, _route_backward, highest, plain, plain_backward, route

T, E, K = 9, 7, 3


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("bias", [None, drawn(E, seed=1)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", SCORES)
def test_float64_keeps_its_precision_and_both_derivatives(score, normalize, bias):
    logits = drawn(T, E).requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda logits: route(logits, K, score, normalize, bias)[1:], logits)


@pytest.mark.parametrize("bias", [None, drawn(E, seed=1)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", SCORES)
def test_float32_is_float64_rounded(score, normalize, bias):
    logits = drawn(T, E).requires_grad_()
    single = logits.detach().float().requires_grad_()
    wanted, actual = route(logits, K, score, normalize, bias), route(single, K, score, normalize, bias)
    assert torch.equal(actual[0], wanted[0])
    for a, w in zip(actual[1:], wanted[1:], strict=True):
        assert a.dtype == torch.float32
        assert close(a, w, 1e-6)
    seeds = drawn(T, K, seed=2), drawn(T, E, seed=3)
    for parts in ((0, 1), (0,), (1,)):  # with and without a gradient of the scores, and of the weight
        a, w = (sum((out[1 + i] * seeds[i]).sum() for i in parts) for out in (actual, wanted))
        (a,), (w,) = (
            torch.autograd.grad(a, single, retain_graph=True),
            torch.autograd.grad(w, logits, retain_graph=True),
        )
        assert close(a, w, 1e-5)
        assert not close(2 * a, w, 1e-3)


@pytest.mark.parametrize("score", SCORES)
def test_float32_has_second_derivatives(score):
    def second(dtype):
        logits = drawn(T, E).to(dtype).requires_grad_()
        _, weight, scores = route(logits, K, score, True)
        total = (weight * drawn(T, K, seed=2)).sum() + (scores * drawn(T, E, seed=3)).sum()
        (first,) = torch.autograd.grad(total.square(), logits, create_graph=True)
        return torch.autograd.grad(first.square().sum(), logits)[0]

    assert close(second(torch.float32), second(torch.float64), 1e-5)
    assert second(torch.float64).abs().max() > 1e-3


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", SCORES)
def test_the_written_backward_is_that_of_autograd(score, normalize, tiny):
    logits = drawn(T, E)
    if tiny:  # weights that normalisation does not divide by their sum
        logits = logits - 720
    logits.requires_grad_()
    weight, scores, expert = plain(logits, None, K, score == "sigmoid", normalize)
    seeds = drawn(T, K, seed=2), drawn(T, E, seed=3)
    (wanted,) = torch.autograd.grad(((weight * seeds[0]).sum() + (scores * seeds[1]).sum()), logits)
    assert close(plain_backward(*seeds, expert, scores.detach(), score == "sigmoid", normalize), wanted, 1e-12)


def test_bias_moves_the_choice_and_nothing_else():
    logits, bias = drawn(T, E), torch.zeros(E)
    bias[4] = 5.0
    expert, weight, scores = route(logits, K, "sigmoid", bias=bias)
    assert (expert[:, 0] == 4).all()
    assert torch.equal(scores, logits.sigmoid())
    assert torch.equal(weight, scores.gather(1, expert))
    assert torch.equal(expert[:, 1:], torch.where(torch.arange(E) == 4, -99.0, logits).topk(K - 1).indices)


def test_bias_gets_no_gradient():
    bias = torch.zeros(E, requires_grad=True)
    for dtype in (torch.float32, torch.float64):
        route(drawn(T, E, dtype=dtype).requires_grad_(), K, bias=bias)[1].sum().backward()
    assert bias.grad is None


def test_the_highest_two_are_distinct_whatever_the_scores():
    assert torch.equal(highest(drawn(200, 64), 2), drawn(200, 64).topk(2).indices)
    inf, nan = torch.inf, torch.nan
    rows = [0, 0, 0], [-inf, -inf, 1], [-inf, -inf, -inf], [inf, 0, inf], [0, nan, 1], [nan, 1, nan], [-inf, nan, -inf]
    found = highest(torch.tensor(rows), 2).tolist()
    assert found == [[0, 1], [2, 0], [0, 1], [0, 2], [1, 2], [0, 2], [1, 0]]


@pytest.mark.parametrize("bias", [None, drawn(E, seed=1, dtype=torch.float32)])
def test_opcheck(bias):
    logits = drawn(T, E, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(_route, (logits, bias, K, True, True))
    weight, scores, expert = (out.detach() for out in _route(logits, bias, K, False, True))
    for grads in ((weight, scores), (None, scores), (weight, None)):
        torch.library.opcheck(_route_backward, (*grads, expert, scores, False, True))


def test_what_does_not_fit_is_refused():
    logits = drawn(T, E)
    with pytest.raises(ValueError, match="score must be one of softmax, sigmoid; got 'relu'"):
        route(logits, K, "relu")
    for k in (0, E + 1):
        with pytest.raises(ValueError, match=rf"logits must be \[T, E\] with k={k} at least 1"):
            route(logits, k)
    with pytest.raises(ValueError, match=r"bias must be \[E\] with E=7; got \(1, 7\)"):
        route(logits, K, bias=torch.zeros(1, E))
