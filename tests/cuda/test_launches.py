"""How many kernels a layer launches: with a few thousand tokens, launches take more time than the kernels."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from launches import Launches
from torch import nn
from turnout.cuda import launch, tiles
from turnout.moe import MoE, aux_loss
from turnout.moe.gates import wide_linear

grouped = pytest.importorskip("turnout.cuda.grouped", exc_type=ImportError)  # needs Triton
scaling = pytest.importorskip("turnout.cuda.scaling", exc_type=ImportError)


@pytest.fixture
def launches(monkeypatch):
    counted = Launches()
    monkeypatch.setitem(launch.backends, "meta", counted.launched)
    for name in ("tiles", "up", "down", "hidden", "weight", "bias"):
        monkeypatch.setattr(grouped, f"{name}_kernel", counted.triton(name))
    for name in ("rows", "columns"):
        monkeypatch.setattr(scaling, f"{name}_kernel", counted.triton(f"cast of {name}"))
    monkeypatch.setattr(grouped, "blocks", lambda kernel, x, rows, shape=None: tiles.sizes(kernel, 2, 9, True))
    monkeypatch.setattr(wide_linear, "_multiplies", lambda x: True)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know meta
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    return counted


def step(launches: Launches, layers: int, precision: str | None) -> Counter[str]:
    """Launches of a forward, the losses, and a backward."""
    model = nn.Sequential(*(MoE(64, 32, 8, 2) for _ in range(layers))).to("meta", torch.bfloat16)
    for layer in model:
        layer.experts.kernel, layer.experts.precision = "triton", precision
    x = torch.zeros(128, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    grads = torch.zeros_like(x), torch.zeros((), device="meta")
    launches.count.clear()
    with launches:
        torch.autograd.grad([model(x), aux_loss(model)], [x, *model.parameters()], grads)
    return launches.count.copy()


def of_a_layer(launches: Launches, precision: str | None = None) -> Counter[str]:
    one, two = (step(launches, layers, precision) for layers in (1, 2))
    return two - one


def test_launches_of_a_layer(launches):
    layer = of_a_layer(launches)
    assert layer.total() < 60, layer
    ours = {"tiles": 2, "up": 1, "down": 2, "hidden": 1, "weight": 2, "decode": 2}
    assert {name: layer[name] for name in ours} == ours
    assert {layer[name] for name in ("plan_count", "plan_place", "route", "route_backward")} == {1}


def test_float8_launches_nine_casts_more(launches):
    """Forward: tokens, hidden rows, columns of three matrices. Backward: rows of y's gradient, of down, of the two
    slopes in one, and of up and gate in one.
    """
    casts = Counter({"cast of rows": 6, "cast of columns": 3})
    assert of_a_layer(launches, "fp8") == of_a_layer(launches) + casts
