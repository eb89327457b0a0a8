"""Kernels in tests: on the CPU through the runner; `device` gives each test both that and the GPU."""

import shutil

import pytest
import torch
from runner import Runner, installed


@pytest.fixture
def kernels_on_cpu():
    """CPU tensors run kernels, not plain PyTorch: the backend that does it."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to run kernels on the CPU")
    runner = Runner()
    with installed(runner):
        yield runner


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """A device that runs kernels: the CPU through the runner, and the real thing where there is one."""
    if request.param == "cpu":
        request.getfixturevalue("kernels_on_cpu")
    elif not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)
