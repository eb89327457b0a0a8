"""The models and shards that the tests on many ranks share."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from turnout.moe import Balance, MoE

WIDTH, EXPERTS = 16, 8
HALVES = torch.__version__ >= "2.13"  # before, zero-bubble schedules are refused: test_pipeline_parts.py


def runnable(cases: Iterable[Any]) -> list[Any]:
    """Arguments of tests, told to skip where they name a schedule that this torch cannot run."""
    skip = pytest.mark.skipif(not HALVES, reason="zero-bubble schedules need torch 2.13")
    split = (case if isinstance(case, tuple) else (case,) for case in cases)
    return [pytest.param(*case, marks=skip if "zb" in str(case) else ()) for case in split]


def log_lines() -> list[str]:
    """A list that gets what the package logs in this process from now on."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("turnout")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return lines


def perceptron() -> nn.Module:
    """An expert of a user's own."""
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH))


def build(dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """Two MoE layers, one of each kind of experts, between dense ones; the same on every rank."""
    torch.manual_seed(0)
    options = {"balance": Balance(over="global", z_loss=1e-2), **options}
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH),
        MoE(WIDTH, 12, EXPERTS, top_k=3, bias=True, shared=1, **options),
        nn.Linear(WIDTH, WIDTH),
        MoE(WIDTH, 12, EXPERTS, experts=perceptron, **options),
    )
    model[1].gate.bias = nn.Parameter(torch.zeros(EXPERTS))  # a router bias, too
    return model.to(dtype)


def tokens(number: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """x [number, D], no two tokens alike."""
    return torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(1), dtype=dtype)


def crowd(model: nn.Module) -> None:
    """All tokens choose the same experts."""
    for layer in model.modules():
        if isinstance(layer, MoE):
            with torch.no_grad():
                layer.gate.weight.zero_()  # equal scores: the first k of all


def whole(tensor: Tensor) -> Tensor:
    """A plain copy of a tensor, gathered if it is spread."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone()


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Largest difference at most `tolerance`; the signal must be far above it, or the test could not fail."""
    assert actual.shape == expected.shape, what
    if expected.numel():
        assert not expected.any() or expected.abs().max() > 100 * tolerance, f"{what}: too little signal"
        assert (actual - expected).abs().max() <= tolerance, f"{what}: {(actual - expected).abs().max():.2e}"
