"""Time of a layer in a step: one forward and one backward, whatever the input is and however often it is used."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
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


class Gathers(nn.Module):
    """Its weight's gradient needs as many ticks as are drawn in its backward, after the gradient of x is there."""

    def __init__(self, ticks) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

        class Gather(torch.autograd.Function):
            @staticmethod
            def forward(ctx, weight):
                return weight.clone()

            @staticmethod
            def backward(ctx, grad):
                for _ in range(5):
                    next(ticks)
                return grad

        self.gather = Gather.apply

    def forward(self, x):
        return x * self.gather(self.weight)


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_gradients_of_gathered_weights_are_part_of_the_time(leaf, named, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(layer_time, "_now", lambda tensor: float(next(ticks)))
    timer, layer, x = layer_time.LayerTimer(), Gathers(ticks), torch.randn(5, 8, requires_grad=True)
    timer.attach(layer)
    given = x if leaf else x * 1
    y = layer(x=given) if named else layer(given)
    y.sum().backward()
    timer.end_step()
    assert timer.take() == 1 + 1 + 5
    assert x.grad is not None


def test_other_uses_of_the_input_are_no_part_of_the_time(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(layer_time, "_now", lambda tensor: float(next(ticks)))
    timer, layer, other = layer_time.LayerTimer(), MoE(8, 16, 4, balance=0.0, seed=0), Gathers(ticks)
    timer.attach(layer)
    x = torch.randn(5, 8, requires_grad=True) * 1
    (other(x) + layer(x)).sum().backward()
    timer.end_step()
    assert timer.take() == 2.0
