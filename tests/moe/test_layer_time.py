"""Time of a layer in a step: one forward and one backward, whatever the input is and however often it is used."""

from __future__ import annotations

import copy

import pytest
import torch
from turnout.moe import MoE
from turnout.moe.parallel import layer_time


@pytest.mark.parametrize("leaf", [True, False])
def test_each_step_has_its_own_spans(leaf, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(layer_time, "_now", lambda tensor: float(next(ticks)))
    layer, timer = MoE(8, 16, 4, balance=0.0, seed=0), layer_time.LayerTimer()
    timer.attach(layer)
    x = torch.randn(5, 8, requires_grad=True)  # it lives longer than a step
    for _ in range(4):
        y = layer(x if leaf else x * 1)
        y.sum().backward()
        assert len(timer.spans) == 2
        timer.end_step()
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    assert len(timer.spans) == 0
    assert timer.take() == 2.0  # a tick from start to end, forward and backward
    assert timer.take() == 0.0
    layer.train()(x)  # no backward: the next one is not mistaken for it
    layer(x).sum().backward()
    assert len(timer.spans) == 3
    assert copy.deepcopy(layer) is not layer
