"""CPUs that multiply bfloat16 slower than float32: large products are computed in float32, small ones are not."""

import pytest
import torch
from reference import close
from turnout.dispatch.local import LocalDispatcher
from turnout.dispatch.plan import Plan
from turnout.dispatch.torch_internals import has_slow_half_products
from turnout.moe.experts.feed_forward import FeedForwardExperts
from turnout.moe.experts.grouped_mm import _grouped_mm, grouped_mm, grouped_product, mm

HALF = torch.bfloat16


def random(*shape, seed=0, dtype=HALF):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def slow_units(monkeypatch):
    monkeypatch.setattr("turnout.moe.experts.grouped_mm._emulated", lambda dtype: False)
    monkeypatch.setattr("turnout.moe.experts.grouped_mm._slow", lambda dtype: dtype == HALF)


@pytest.fixture
def dtypes(monkeypatch):
    """Dtypes in which matrices are multiplied."""
    seen = set()

    def spied(operator):
        return lambda a, *others, **options: seen.add(a.dtype) or operator(a, *others, **options)

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, spied(getattr(torch, name)))
    return seen


@pytest.mark.parametrize(
    ("cpu", "slow"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "avx512_fp16": True, "amx_bf16": False}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "avx512_fp16": True, "amx_bf16": True}, False),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "avx512_fp16": False, "amx_bf16": False}, False),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "avx512_fp16": True, "amx_bf16": False}, False),
        ({"architecture": "arm64", "bf16": True}, False),
        ({}, False),
    ],
    ids=["AMX hidden", "AMX", "before AMX", "AMD", "ARM", "unknown"],
)
def test_which_cpus(cpu, slow, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    assert has_slow_half_products.__wrapped__(torch.bfloat16) == slow
    assert not has_slow_half_products.__wrapped__(torch.float16)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("shape", "wide"), [((64, 80, 96), True), ((63, 80, 96), False), ((64, 80, 8), False)])
def test_large_products_are_in_float32_and_rounded_once(shape, wide, add, dtypes):
    n, i, o = shape
    a, b, out = random(n, i), random(i, o, seed=1), random(n, o, seed=2)
    exact = a.double() @ b.double() + (out.double() if add else 0)
    mm(a, b, out, add)
    assert dtypes == {torch.float32 if wide else HALF}
    assert close(out, exact, torch.finfo(HALF).eps)


def test_a_factor_in_float32_is_not_rounded():
    a, b, out = random(3, 8, dtype=torch.float32), random(8, 5, seed=1), random(3, 5)
    mm(a, b, out)
    assert torch.equal(out, (a @ b.float()).to(HALF))


@pytest.mark.parametrize(("rows", "wide"), [(80, True), (3, False)])
def test_grouped_products_and_their_gradients(rows, wide, dtypes):
    x, matrix, ends = random(2 * rows, 64), random(3, 64, 72, seed=1), torch.tensor([rows, rows, 2 * rows]).int()
    toward = random(2 * rows, 72, seed=2)
    exact = [t.double().requires_grad_() for t in (x, matrix)]
    y = torch.cat([exact[0][:rows] @ exact[1][0], exact[0][rows:] @ exact[1][2]])
    results = [[y, *torch.autograd.grad(y, exact, toward.double())]]
    ours = [x.requires_grad_(), matrix.requires_grad_()]
    y = grouped_mm(*ours, ends)
    results.append([y, *torch.autograd.grad(y, ours, toward)])
    assert dtypes == ({torch.float32, HALF} if wide else {HALF})  # the expert without rows is a small product
    for wanted, found in zip(*results, strict=True):
        assert close(found, wanted, torch.finfo(HALF).eps)


def test_compiled_as_eager():
    x, matrix = random(160, 64).requires_grad_(), random(3, 64, 72, seed=1).requires_grad_()
    ends, results = torch.tensor([80, 80, 160], dtype=torch.int32), []
    for product in (grouped_mm, torch.compile(grouped_mm, backend="aot_eager", fullgraph=True)):
        y = product(x, matrix, ends)
        results.append([y, *torch.autograd.grad(y, [x, matrix], random(160, 72, seed=2))])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("by_group", [False, True])
def test_experts(by_group, activation, monkeypatch, dtypes):
    monkeypatch.setattr("turnout.moe.experts.feed_forward.pays", lambda *sizes: by_group)
    plan = Plan.of(torch.arange(300).reshape(150, 2) % 3, 3)  # 100 rows for each expert
    experts = FeedForwardExperts(64, 72, 3, activation, bias=True, seed=3).to(HALF)
    exact = FeedForwardExperts(64, 72, 3, activation, bias=True).double()
    exact.load_state_dict(experts.state_dict())
    results = []
    for given, dtype in ((exact, torch.float64), (experts, HALF)):
        dtypes.clear()
        x, weight = random(150, 64).to(dtype), random(150, 2, seed=1, dtype=torch.promote_types(dtype, torch.float32))
        of = [x.requires_grad_(), weight.requires_grad_(), *given.parameters()]
        y = LocalDispatcher()(x, plan, weight, given)
        results.append([y, *torch.autograd.grad(y, of, random(150, 64, seed=2).to(dtype))])
    assert dtypes == {torch.float32}
    for wanted, ours in zip(*results, strict=True):
        assert close(ours, wanted, 3e-2)


@pytest.mark.parametrize(("sides", "ours"), [((64, 128), True), ((32, 128), False), ((128, 32), False)])
def test_small_experts_are_multiplied_by_torch(sides, ours):
    """In bfloat16, as products with a small side are."""
    rows, weight = random(6, sides[0]), random(2, *sides)
    assert (grouped_product(rows, weight) is _grouped_mm) == ours
    assert (grouped_product(rows, random(2, 64, 64), weight) is _grouped_mm) == ours
