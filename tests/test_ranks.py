"""The forked ranks of tests can take gradients, whatever ran in their parent before them."""

import torch
from ranks import run
from torch._subclasses import FakeTensorMode


def gradient() -> float:
    x = torch.ones((), requires_grad=True)
    (2 * x).backward()
    return float(x.grad)


def test_after_fake_tensors():
    with FakeTensorMode():  # has imagined GPUs in a build for CUDA that sees none
        torch.ones(1)
    gradient()
    assert run(2, gradient) == [2.0, 2.0]
