"""Factories of experts: what may differ from one expert to the next is values, and all else is refused."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from turnout.moe import MoE
from turnout.moe.experts.modules import ModuleExperts
from turnout.moe.parallel.difference import difference

D = 4


class Acting(nn.Module):
    def __init__(self, act=torch.relu, **attributes) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(D, D), act
        vars(self).update(attributes)

    def forward(self, x):
        return self.act(self.linear(x))


def of_its_own_class(factor=2):
    class Own(nn.Linear):
        def forward(self, x):
            return factor * super().forward(x)

    return Own(D, D)


def hooked(act=torch.relu):
    module = nn.Linear(D, D)
    module.register_forward_hook(lambda module, args, y: act(y))
    return module


def replaced_forward(act=torch.relu):
    module = nn.Linear(D, D)
    module.forward = lambda x: act(nn.Linear.forward(module, x))
    return module


GELU = nn.GELU()
ALIKE = {
    "modules": lambda: nn.Sequential(nn.Linear(D, D), nn.Dropout(0.1), nn.LayerNorm(D), nn.BatchNorm1d(D)),
    "a new lambda each": lambda: Acting(lambda x: x.relu()),
    "a new partial each": lambda: Acting(partial(nn.functional.leaky_relu, negative_slope=0.1)),
    "a new class each": of_its_own_class,
    "a new hook each": hooked,
    "another forward": replaced_forward,
    "a class made by torch": lambda: weight_norm(nn.Linear(D, D)),
    "what all share has no parameters": lambda: nn.Sequential(nn.Linear(D, D), GELU),
    "arrays and tensors": lambda: Acting(
        table=np.arange(3), scale=torch.ones(2), sizes={"a": [1, (2.0, float("nan"))]}
    ),
}


def experts(make, number, device):
    with torch.device(device):
        return ModuleExperts(make, number)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("make", ALIKE.values(), ids=ALIKE)
def test_factories_whose_modules_are_alike(make, device):
    assert len(experts(make, 3, device)) == 3
    assert difference(make(), make()) is None


SHARED = nn.Linear(D, D)
APART = {
    "activation": ([nn.Tanh, nn.ReLU], r"1 is Tanh\(\) and ReLU\(\)"),
    "dropout": ([partial(nn.Dropout, 0.1), partial(nn.Dropout, 0.2)], r"1\.p is 0\.1 and 0\.2"),
    "eps": ([partial(nn.LayerNorm, D), partial(nn.LayerNorm, D, eps=0.1)], r"1\.eps is 1e-05 and 0\.1"),
    "function": ([Acting, partial(Acting, torch.tanh)], r"1\.act is .*relu.* and .*tanh"),
    "lambda": ([lambda: Acting(lambda x: x), lambda: Acting(lambda x: -x)], r"1\.act\.code is"),
    "what a lambda encloses": (
        [lambda a=a: Acting(lambda x: a * x) for a in (1, 2)],
        r"1\.act\.enclosed\.0 is 1 and 2",
    ),
    "partial": (
        [lambda s=s: Acting(partial(nn.functional.leaky_relu, negative_slope=s)) for s in (0.1, 0.2)],
        r"1\.act\.keywords\.negative_slope is 0\.1 and 0\.2",
    ),
    "what a class encloses": ([of_its_own_class, partial(of_its_own_class, 3)], "1 is "),
    "hook": ([hooked, partial(hooked, torch.tanh)], r"1\._forward_hooks\.0\.enclosed\.0"),
    "no hook": ([hooked, partial(nn.Linear, D, D)], r"1\._forward_hooks"),
    "forward": ([replaced_forward, partial(replaced_forward, torch.tanh)], r"1\.forward\.enclosed"),
    "attribute": ([partial(Acting, tag="a"), partial(Acting, tag="b")], r"1\.tag is 'a' and 'b'"),
    "an attribute more": ([Acting, partial(Acting, tag="a")], "1 is "),
    "list": ([partial(Acting, tag=[1, 2]), partial(Acting, tag=[1, 3])], r"1\.tag\.1 is 2 and 3"),
    "array": ([partial(Acting, tag=np.arange(n)) for n in (2, 3)], r"1\.tag is"),
    "tensor": ([partial(Acting, tag=torch.full((1,), v)) for v in (2, 3)], r"1\.tag is"),
    "nobody can tell": ([partial(Acting, tag=torch.Generator()), partial(Acting, tag=torch.Generator())], r"1\.tag is"),
    "dtype": (
        [partial(nn.Linear, D, D, dtype=torch.float64), partial(nn.Linear, D, D)],
        r"1\.weight\.0 is torch.float64",
    ),
    "frozen": ([Acting, lambda: Acting().requires_grad_(False)], r"1\.linear\.weight\.1 is True and False"),
    "bias": ([partial(nn.Linear, D, D), partial(nn.Linear, D, D, bias=False)], r"1\.bias is .* and None"),
    "buffers": ([partial(nn.BatchNorm1d, D), partial(nn.BatchNorm1d, D, track_running_stats=False)], "1"),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize(("kinds", "message"), APART.values(), ids=APART)
def test_another_kind_is_refused_wherever_it_comes(kinds, message, first, device):
    if device == "meta" and "tag" in message and "tensor" in str(kinds):
        pytest.skip("on the meta device tensors have no values")
    order = iter([*[kinds[0]] * first, *[kinds[1]] * 4])
    with pytest.raises(ValueError, match=f"experts must be of one kind, but {message}"):
        experts(lambda: nn.Sequential(nn.Linear(D, D), next(order)()), 3, device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("make", [lambda: SHARED, lambda: nn.Sequential(nn.Linear(D, D), SHARED)])
def test_a_module_cannot_be_a_part_of_two_experts(make, device):
    global SHARED
    SHARED = nn.Linear(D, D, device=device)
    with pytest.raises(ValueError, match="put the same Linear into two experts"):
        experts(make, 3, device)


def test_shapes_are_told_first():
    widths = itertools.count(3)
    with pytest.raises(ValueError, match=r"experts must have one shape, but weight is \(3, 4\) and \(4, 4\)"):
        ModuleExperts(lambda: nn.Linear(4, next(widths)), 4)


def test_in_the_layer():
    kinds = itertools.cycle([nn.Tanh, nn.ReLU])
    with pytest.raises(ValueError, match="experts must be of one kind"):
        MoE(D, D, 2, experts=lambda: nn.Sequential(nn.Linear(D, D), next(kinds)()))


def test_what_a_module_learns_of_itself_later_is_no_other_kind():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    layer = MoE(D, D, 2, experts=lambda: Counting(D, D), seed=0)
    before = layer.experts.module.weight.clone()
    layer(torch.randn(5, D))
    layer.eval().experts.reset_parameters()
    assert torch.equal(layer.experts.module.weight, before)
