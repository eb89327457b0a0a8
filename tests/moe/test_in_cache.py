"""Experts a few at a time on a CPU: the same as all at once, with less kept; half precision without units for it."""

import ctypes
import os
import platform
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from reference import close
from torch.utils._python_dispatch import TorchDispatchMode
from turnout.dispatch.local import LocalDispatcher
from turnout.dispatch.plan import Plan
from turnout.moe import MoE
from turnout.moe.experts.activation import ACTIVATIONS
from turnout.moe.experts.blocked import _faulted_anew, groups, pays
from turnout.moe.experts.feed_forward import FeedForwardExperts
from turnout.moe.experts.grouped_mm import grouped_mm

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HALVES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch):
    monkeypatch.setattr("turnout.moe.experts.feed_forward.pays", lambda *sizes: True)


@pytest.mark.usefixtures("half_units")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_gathered_group_by_group_or_all_at_once(activation, bias, dtype, monkeypatch):
    monkeypatch.setattr("turnout.moe.experts.blocked._GROUP", 48)  # three rows: experts 0 and 1, 2, and 3
    chosen = torch.tensor([[3, 0], [0, -1], [2, 3], [-1, -1], [3, 2]])
    plan, dispatcher = Plan.of(chosen, 4), LocalDispatcher()
    experts = FeedForwardExperts(8, 16, 4, activation, bias, seed=3).to(dtype)
    toward, results = random(5, 8, seed=2, dtype=dtype), []
    apart = super(LocalDispatcher, dispatcher).__call__
    for grouped, trip in ((True, dispatcher), (False, dispatcher), (False, apart)):
        monkeypatch.setattr("turnout.moe.experts.feed_forward.pays", lambda *sizes, grouped=grouped: grouped)
        experts.zero_grad()
        x, weight = random(5, 8, dtype=dtype), random(5, 2, seed=1).to(torch.promote_types(dtype, torch.float32))
        x, weight = x.requires_grad_(), weight.requires_grad_()
        y = trip(x, plan, weight, experts)
        y.backward(toward)
        results.append([y, x.grad, weight.grad, *(p.grad for p in experts.parameters())])
    for grouped, at_once, apart in zip(*results, strict=True):
        assert grouped.dtype == at_once.dtype == apart.dtype
        assert close(grouped, apart, TOLERANCE[dtype])
        assert close(at_once, apart, TOLERANCE[dtype])
    assert not results[0][0][3].any(), "a token of nobody's"


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives(activation, gathers):
    plan = Plan.of(torch.tensor([[3, 0], [0, -1], [2, 3]]), 4)
    experts = FeedForwardExperts(3, 2, 4, activation, bias=True, seed=3).double()
    x, weight = random(3 if gathers else 6, 3).requires_grad_(), random(*((3, 2) if gathers else (6,)), seed=1).abs()
    given = [x, weight.requires_grad_(), *experts.parameters()]
    kept = slice(None) if gathers else slice(int(plan.counts.sum()))  # rows past them are nobody's

    def first(*_):
        y = LocalDispatcher()(x, plan, weight, experts) if gathers else experts(x, weight, plan.counts)
        return y[kept]

    assert torch.autograd.gradgradcheck(first, given)
    (to_x,) = torch.autograd.grad(first().sum(), x, create_graph=True)  # of a gradient that needs none itself
    assert to_x.requires_grad


@pytest.mark.parametrize("few", [False, True])
def test_second_derivatives_where_the_weight_is_made_of_the_tokens(few, monkeypatch):
    monkeypatch.setattr("turnout.moe.experts.feed_forward.pays", lambda *sizes: few)
    layer, x = MoE(3, 4, 3, seed=0, bias=True, balance=0).double(), random(4, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("capacity", [None, 3])
@pytest.mark.parametrize("hidden", [4, 16])
def test_a_plan_in_place_of_rows(hidden, capacity, few, monkeypatch):
    monkeypatch.setattr("turnout.moe.experts.feed_forward.pays", lambda *sizes: few)
    plan = Plan.of(torch.tensor([[3, 0], [0, -1], [2, 3], [-1, -1], [3, 2]]), 4, capacity)
    experts = FeedForwardExperts(8, hidden, 4, bias=True).double()
    x, weight = random(5, 8), random(5, 2, seed=1)
    apart = super(LocalDispatcher, dispatcher := LocalDispatcher()).__call__(x, plan, weight, experts)
    assert close(dispatcher(x, plan, weight, experts), apart, 1e-12)


@pytest.mark.parametrize("few", [False, True])
def test_padding_is_not_multiplied(few, monkeypatch):
    monkeypatch.setattr("turnout.moe.experts.feed_forward.pays", lambda *sizes: few)
    number = []
    monkeypatch.setattr(torch, "mm", lambda a, *b, mm=torch.mm, **out: number.append(len(a)) or mm(a, *b, **out))
    experts, chosen = FeedForwardExperts(8, 16, 2, "gelu").double(), torch.tensor([[1], [0], [1], [-1]])
    with torch.no_grad():
        LocalDispatcher()(random(4, 8), Plan.of(chosen, 2, capacity=9), torch.ones(4, 1), experts)
    assert sorted(number) == [1, 1, 2, 2], "rows of both experts, up and down"


def test_gathered_rows_are_not_kept():
    experts, kept = FeedForwardExperts(8, 16, 4, "gelu"), []
    plan = Plan.of(torch.arange(40).reshape(10, 4) % 4, 4)
    x, weight = random(10, 8, dtype=torch.float32).requires_grad_(), torch.ones(10, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        LocalDispatcher()(x, plan, weight, experts)
    assert 10 * 8 in kept, "the tokens"
    assert 40 * 8 not in kept, "a row for each choice"
    assert kept.count(40 * 16) == 1, "of the hidden rows one copy"


@pytest.mark.usefixtures("half_units")
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_with_and_without_units_for_it(dtype):
    rows, matrix = random(9, 8, dtype=dtype), random(3, 8, 16, seed=1, dtype=dtype)
    ends, toward = torch.tensor([4, 4, 9], dtype=torch.int32), random(9, 16, seed=2, dtype=dtype)
    exact = [t.double().requires_grad_() for t in (rows, matrix)]
    expected = torch.cat([exact[0][:4] @ exact[1][0], exact[0][4:] @ exact[1][2]])
    expected.backward(toward.double())
    rows, matrix = rows.requires_grad_(), matrix.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must not reach the products in float32
        y = grouped_mm(rows, matrix, ends)
    y.backward(toward)
    rounding = torch.finfo(dtype).eps
    for ours, theirs in ((y, expected), (rows.grad, exact[0].grad), (matrix.grad, exact[1].grad)):
        assert ours.dtype == dtype
        assert close(ours, theirs, rounding)


@pytest.mark.parametrize("elements", [1, 20, 10**9])
@pytest.mark.parametrize("counts", [[], [0, 0], [3, 0, 2, 9, 1, 0], [0, 9, 0]])
def test_groups_are_all_experts_in_order(counts, elements):
    found = groups(torch.tensor(counts, dtype=torch.int64), 4, elements)
    assert [size for group in found for size in group.sizes] == counts
    assert [e for group in found for e in range(group.experts.start, group.experts.stop)] == list(range(len(counts)))
    assert [r for group in found for r in range(group.rows.start, group.rows.stop)] == list(range(sum(counts)))
    for group in found:
        assert sum(group.sizes) == group.rows.stop - group.rows.start
        assert 4 * sum(group.sizes) <= elements or len(group.sizes) == 1
    for group, after in pairwise(found):
        assert 4 * (sum(group.sizes) + after.sizes[0]) > elements, "one more would have had room"


def test_a_few_at_a_time_where_buffers_are_large(monkeypatch, half_units):
    monkeypatch.setattr("turnout.moe.experts.blocked._faulted_anew", lambda: True)
    half, meta = torch.empty(0, dtype=torch.bfloat16), torch.empty(0, device="meta")
    assert pays(torch.empty(0), 32768, width=512)
    assert pays(half, 32768, width=512)
    assert pays(half, 8192, width=1024) != half_units, "16 MiB, but computed in float32 where there are no units"
    assert not pays(half, 8192, width=512)
    assert not pays(meta, 32768, width=512), "another device"
    monkeypatch.setattr("turnout.moe.experts.blocked._faulted_anew", lambda: False)
    assert not pays(torch.empty(0), 32768, width=512), "an allocator that keeps its pages"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ, reason="asks glibc's allocator")
@pytest.mark.skipif(HUGE.exists() and "[always]" in HUGE.read_text(), reason="one fault brings 2 MiB in")
@pytest.mark.parametrize("keeps", [False, True])
def test_an_allocator_that_keeps_its_pages_is_noticed(keeps):
    child = os.fork()
    if not child:
        found = 2
        try:
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0 if keeps else 65536)  # M_MMAP_MAX
            mallopt(-1, 2**31 - 1 if keeps else 2**17)  # M_TRIM_THRESHOLD
            taken = [bytes(1 << 26) for _ in range(8)]  # what room earlier tests have left in the heap
            found = int(_faulted_anew.__wrapped__())
            del taken
        finally:
            os._exit(found)  # whatever was raised: the child must not go on with the tests
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (not keeps)


def test_nothing_is_kept_without_gradients(monkeypatch):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            self.elements = max([self.elements, *(t.numel() for t in (out,) if isinstance(t, torch.Tensor))])
            return out

    monkeypatch.setattr("turnout.moe.experts.blocked._GROUP", 10 * 16)
    experts, plan = FeedForwardExperts(8, 16, 4, "gelu"), Plan.of(torch.arange(40).reshape(10, 4) % 4, 4)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), Largest() as largest:
            LocalDispatcher()(random(10, 8, dtype=torch.float32), plan, torch.ones(10, 4), experts)
        assert (largest.elements >= 40 * 16) == gradients, "hidden rows of all experts"
