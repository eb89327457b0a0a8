"""encode and decode: each other's inverse and adjoint, deaf to rows that belong to nobody."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import close
from strategies import assignments
from turnout.dispatch import Plan, decode, encode
from turnout.dispatch.reorder import encode_weight, permute
from turnout.moe.experts.grouped_mm import grouped_mm

NAN = float("nan")
EXPERT = torch.tensor([[1, 3], [3, -1], [-1, -1], [0, 1], [3, 0]])  # two drops, one token dropped everywhere
PLANS = {"ragged": Plan.of(EXPERT, 4), "padded": Plan.of(EXPERT, 4, 4), "nothing": Plan.of(EXPERT[:0], 4)}
PLANS["trimmed"] = PLANS["ragged"].trimmed(7)
PLANS["all dropped"] = Plan.of(torch.full_like(EXPERT, -1), 4)
PLANS["no rows"] = PLANS["all dropped"].trimmed(0)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plan_of(case, spare):
    expert, E = case
    ragged = Plan.of(expert, E)
    return ragged if spare is None else ragged.padded(int(ragged.counts.max()) + spare)


either = st.none() | st.integers(0, 2)


@given(assignments(), either)
def test_encode_by_hand(case, spare):
    plan = plan_of(case, spare)
    x = random(len(plan.slot), 3)
    rows = encode(x, plan)
    assert rows.dtype == x.dtype
    for row, token in zip(rows, plan.token.tolist(), strict=True):
        assert torch.equal(row, x[token] if token >= 0 else torch.zeros(3).double())


@given(assignments(), either)
def test_decode_by_hand(case, spare):
    plan = plan_of(case, spare)
    rows, weight = random(len(plan.token), 3), random(*plan.slot.shape, seed=1)
    y, weighted = decode(rows, plan), decode(rows, plan, weight)
    for t, homes in enumerate(plan.slot.tolist()):
        zero = torch.zeros(3).double()
        assert close(y[t], sum((rows[r] for r in homes if r >= 0), zero), 1e-14)
        terms = (weight[t, j] * rows[r] for j, r in enumerate(homes) if r >= 0)
        assert close(weighted[t], sum(terms, zero), 1e-14)


@given(assignments(drops=False), either)
def test_round_trip(case, spare):
    expert, E = case
    plan = plan_of((expert[:, :1].clone(), E), spare)
    x = random(len(expert), 3)
    assert torch.equal(decode(encode(x, plan), plan), x)


@given(assignments(), either)
def test_adjoint(case, spare):
    plan = plan_of(case, spare)
    x, rows = random(len(plan.slot), 3), random(len(plan.token), 3, seed=1)
    assert close((encode(x, plan) * rows).sum(), (x * decode(rows, plan)).sum(), 1e-12)


def test_adjoint_of_another_plan_is_told_apart():
    x, rows, other = random(5, 3), random(10, 3, seed=1), Plan.of(EXPERT.flip(0), 4)
    assert not close((encode(x, PLANS["ragged"]) * rows).sum(), (x * decode(rows, other)).sum(), 1e-12)


@pytest.mark.parametrize("name", PLANS)
def test_gradients(name):
    plan = PLANS[name]
    x = random(len(plan.slot), 3).requires_grad_()
    rows = random(len(plan.token), 3).requires_grad_()
    weight = random(*plan.slot.shape).requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: encode(x, plan), (x,))
        assert check(lambda rows: decode(rows, plan), (rows,))
        assert check(lambda rows, weight: decode(rows, plan, weight), (rows, weight))
        assert check(lambda weight: encode_weight(weight, plan), (weight,))


@pytest.mark.parametrize("weight", [None, torch.ones(3, 2)])
def test_rows_without_an_assignment_get_no_gradient(weight):
    """Row 5 is empty. Zeros would not do as its weight: token 0, which it would read, has a gradient of NaN."""
    plan, rows = Plan.of(torch.tensor([[2, 0], [0, -1], [1, 2]]), 3), random(6, 4).requires_grad_()
    grad = torch.ones(3, 4, dtype=torch.float64)
    grad[0] = torch.nan
    decode(rows, plan, weight).backward(grad)
    of_token_0 = plan.slot[0]
    assert rows.grad[of_token_0].isnan().all()
    assert rows.grad[plan.token < 0].eq(0).all()
    assert rows.grad.isnan().sum() == of_token_0.numel() * 4


def test_permute():
    order = torch.tensor([2, 0, 3, 1])
    inverse = order.argsort()
    for rows in (random(4, 3), random(4)):
        assert torch.equal(permute(rows, order, inverse), rows[order])
        rows.requires_grad_()
        assert torch.autograd.gradcheck(lambda rows: permute(rows, order, inverse), (rows,))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_are_well_formed(name, dtype):
    plan = PLANS[name]
    x = random(len(plan.slot), 3).to(dtype).requires_grad_()
    rows = random(len(plan.token), 3).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.turnout.encode.default, (x, plan.token, plan.slot))
    torch.library.opcheck(torch.ops.turnout.decode.default, (rows, plan.token, plan.slot))


@pytest.mark.parametrize("ends", [[2, 2, 5], [0, 0, 0], [0, 4, 6]])
def test_grouped_mm_is_well_formed(ends):
    rows, weight = random(6, 3).requires_grad_(), random(3, 3, 5).requires_grad_()
    ends = torch.tensor(ends, dtype=torch.int32)
    torch.library.opcheck(torch.ops.turnout.grouped_mm.default, (rows, weight, ends))
    torch.library.opcheck(torch.ops.turnout.grouped_mm_weight.default, (rows, random(6, 5).requires_grad_(), ends))
    full = torch.tensor([2, 2, 6], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda rows, weight: grouped_mm(rows, weight, full), (rows, weight))
    assert torch.autograd.gradgradcheck(lambda rows, weight: grouped_mm(rows, weight, full), (rows, weight))
    wanted = torch.cat([rows[:2] @ weight[0], rows[2:] @ weight[2]])
    assert close(grouped_mm(rows, weight, full), wanted, 1e-14)
    assert not close(grouped_mm(rows, weight.flip(0), full), wanted, 1e-3)


def test_bfloat16_accumulates_in_float32():
    # 256 + 1 is 256 in bfloat16, so that a sum rounded at each step would stay there.
    plan = Plan.of(torch.arange(5).unsqueeze(0), 5)
    rows = torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert decode(rows, plan).item() == 260
    step = rows[0]
    for row in rows[1:]:
        step = step + row
    assert step.item() == 256
    weighted = decode(rows, plan, torch.ones(1, 5))
    assert weighted.dtype == torch.bfloat16
    assert weighted.item() == 260
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    encode(x, plan).backward(rows)
    assert x.grad.item() == 260


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_rounded_once_to_nearest(dtype, k):
    plan = Plan.of(random(50, 8).topk(k).indices, 8)
    rows = random(50 * k, 16, dtype=torch.float32).to(dtype)
    exact = decode(rows.float(), plan)
    y, even = decode(rows, plan), exact.to(dtype)
    assert dtype == torch.bfloat16 or torch.equal(y, even)
    apart = y != even  # of ties in bfloat16, the other neighbour: see turnout.dispatch.reorder
    assert torch.equal((y.float() - exact)[apart], (exact - even.float())[apart])


@pytest.mark.parametrize("name", ["ragged", "padded", "all dropped"])
def test_nan_of_nobodys_rows_does_not_leak(name):
    plan = PLANS[name]
    rows = torch.where((plan.token < 0).unsqueeze(1), NAN, random(len(plan.token), 3)).requires_grad_()
    assert rows.isnan().any(), "the test needs an empty row"
    y = decode(rows, plan)
    clean = torch.where((plan.token < 0).unsqueeze(1), 0.0, rows.detach())
    assert torch.equal(y, decode(clean, plan))
    y.sum().backward()
    assert torch.equal(rows.grad, (plan.token >= 0).double().unsqueeze(1).expand(-1, 3))


def test_nan_of_a_dropped_token_does_not_leak():
    x = random(5, 3)
    x[2] = NAN  # dropped everywhere
    x.requires_grad_()
    rows = encode(x, PLANS["padded"])
    assert rows.isfinite().all()
    rows.backward(torch.where((PLANS["padded"].token < 0).unsqueeze(1), NAN, torch.ones_like(rows)))
    assert x.grad[:, 0].tolist() == [2, 1, 0, 2, 2]


def test_nan_weights_of_the_dropped_do_not_leak():
    weight = torch.where(EXPERT < 0, NAN, random(5, 2))
    assert encode_weight(weight, PLANS["padded"]).isfinite().all()
    assert decode(random(10, 3), PLANS["ragged"], weight).isfinite().all()


def test_nan_rows_give_weights_no_gradient():
    plan = PLANS["padded"]
    rows = torch.where((plan.token < 0).unsqueeze(1), NAN, random(len(plan.token), 3)).requires_grad_()
    weight = random(5, 2, seed=1).requires_grad_()
    decode(rows, plan, weight).sum().backward()
    for t, homes in enumerate(plan.slot.tolist()):
        for j, home in enumerate(homes):
            assert close(weight.grad[t, j], rows[home].sum() if home >= 0 else torch.tensor(0.0), 1e-12)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="T=5"):
        encode(random(4, 3), PLANS["ragged"])
    with pytest.raises(ValueError, match="R=10"):
        decode(random(9, 3), PLANS["ragged"])


def test_two_runs_agree_to_the_bit():
    rows, weight = random(10, 7, dtype=torch.float32), random(5, 2, dtype=torch.float32)
    assert torch.equal(decode(rows, PLANS["ragged"], weight), decode(rows, PLANS["ragged"], weight))
