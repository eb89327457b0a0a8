"""Our operators in eager mode on a CPU: an autograd.Function, with the results of the custom operator."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from turnout.dispatch import reorder
from turnout.dispatch.plan import Plan
from turnout.moe.experts import grouped_mm

PLAN = Plan.of(torch.tensor([[2, 0], [0, -1], [1, 2]]), 3)
ENDS = torch.tensor([2, 3, 6], dtype=torch.int32)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


CASES = {
    "_encode": (reorder, random(3, 4), PLAN.token, PLAN.slot),
    "_decode": (reorder, random(6, 4), PLAN.token, PLAN.slot),
    "_decode_weighted": (reorder, random(6, 4), random(3, 2, seed=1), PLAN.token, PLAN.slot),
    "_decode_weighted_backward": (reorder, random(3, 4), random(6, 4), random(3, 2), PLAN.token, PLAN.slot),
    "_grouped_mm": (grouped_mm, random(6, 4), random(3, 4, 5, seed=1), ENDS),
    "_grouped_mm_weight": (grouped_mm, random(6, 4), random(6, 5, seed=1), ENDS),
    "_grouped_bias": (grouped_mm, random(3, 5), ENDS, 6),
    "_grouped_sum": (grouped_mm, random(6, 5), ENDS),
}


def gradients(call, given):
    """Results, gradients, and gradients of the gradients."""
    leaves = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
    y = call(*given)
    ys = list(y) if isinstance(y, tuple) else [y]
    first = torch.autograd.grad(sum(y.square().sum() for y in ys), leaves, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves, allow_unused=True)
    return [*ys, *first, *second]


@pytest.mark.parametrize("name", CASES)
def test_a_call_equals_the_custom_operator(name):
    module, *given = CASES[name]
    operator = getattr(module, name)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        eager = gradients(operator, given)
    assert operator.name in {event.name for event in seen.events()}, "profilers show the operator's name"
    for found, wanted in zip(eager, gradients(operator.custom, given), strict=True):
        assert torch.equal(found, wanted)


def test_who_gets_the_custom_operator():
    """Tensors without values, which a body cannot read, have the shapes that the operator is registered with."""
    rows = torch.zeros(6, 4)
    assert reorder._decode(nn.Parameter(rows), PLAN.token, PLAN.slot).grad_fn.name() == "turnout::decodeBackward"
    with FakeTensorMode() as fake:
        given = [fake.from_tensor(t) for t in (rows, PLAN.token, PLAN.slot)]
        assert reorder._decode(*given).shape == (3, 4)


@pytest.mark.parametrize("weight", [None, torch.ones(3, 2)])
def test_rows_without_an_assignment_get_no_gradient(weight):
    """Row 5 is empty. Zeros would not do as its weight: token 0, which it would read, has a gradient of NaN."""
    rows = random(6, 4).detach().requires_grad_()
    grad = torch.ones(3, 4, dtype=torch.float64)
    grad[0] = torch.nan
    reorder.decode(rows, PLAN, weight).backward(grad)
    of_token_0 = PLAN.slot[0]
    assert rows.grad[of_token_0].isnan().all()
    assert rows.grad[PLAN.token < 0].eq(0).all()
    assert rows.grad.isnan().sum() == of_token_0.numel() * 4


@pytest.mark.parametrize("num_experts", [3, (1 << 16) - 1, 1 << 16, 1 << 20])
def test_the_order_of_any_number_of_experts(num_experts):
    expert = torch.randint(-1, num_experts, (40, 2), generator=torch.Generator().manual_seed(0))
    expert[0], expert[1] = -1, num_experts - 1
    kept = [(e, row // 2) for row, e in enumerate(expert.flatten().tolist()) if e >= 0]
    wanted = [token for _, token in sorted(kept)]
    assert Plan.of(expert, num_experts).token.tolist() == wanted + [-1] * (80 - len(wanted))
