"""A layer in float8, a step of it, and the same in float64."""

import copy

import torch
from turnout.moe import MoE

D, H, E, k = 64, 96, 8, 2


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(dtype=torch.float32, precision="fp8", **options):
    torch.manual_seed(0)
    moe = MoE(D, H, E, k, seed=0, balance=0, **options).to(dtype)
    moe.experts.precision = precision
    return moe


def step(moe, x, grad):
    """The output, and gradients of x and of the experts' parameters, by name."""
    x = x.detach().requires_grad_()
    y = moe(x)
    inputs = {"x": x, **dict(moe.experts.named_parameters())}
    return {"y": y} | dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), grad), strict=True))


def exact(moe, x, grad):
    """The same in float64, for the experts that the layer chose."""
    moe = copy.deepcopy(moe).double()
    moe.experts.precision = None
    return step(moe, x.double(), grad.double())


def error(actual, expected):
    """Norm of the difference as a share of the norm."""
    return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm())
