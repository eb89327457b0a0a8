"""What the tests of several gates share."""

import math

import torch
from reference import close


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def is_a_routing(routing, T, k, E):
    assert routing.expert.shape == routing.weight.shape == (T, k)
    assert routing.scores.shape == (T, E)
    assert ((routing.expert >= 0) & (routing.expert < E)).all()
    assert (routing.expert.sort().values.diff() > 0).all(), "an expert twice"
    assert close(routing.scores.sum(1), torch.ones(T), 1e-6)
    assert (routing.weight > 0).all()


def even_within(counts, sigmas=4.5):
    """Chi-square within so many of its deviations."""
    n = len(counts) - 1
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum()) < n + sigmas * math.sqrt(2 * n)


def built(gate):
    """With weights drawn anew, in float64."""
    with torch.no_grad():
        for i, p in enumerate(p for p in gate.parameters() if p.numel() > 1):
            p.copy_(drawn(*p.shape, seed=7 + i))
    return gate.double()


def same(actual, wanted, leaves, tol=1e-10):
    """Values, and gradients in the leaves."""
    seed = drawn(*wanted.shape, seed=3)
    grads = (torch.autograd.grad((y * seed).sum(), leaves, retain_graph=True) for y in (actual, wanted))
    return close(actual, wanted, tol) and all(close(a, w, tol) for a, w in zip(*grads, strict=True))
