"""A plan is one layout of the assignments and nothing else: sorted, invertible, empty where it says so."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import assignments
from turnout.dispatch import Plan
from turnout.dispatch.plan import _plan, load
from turnout.dispatch.reorder import encode_weight
from turnout.dispatch.row_blocks import invert, reorder


def by_hand(expert, E):
    """Rows of a ragged plan: (expert, token, choice) of each, in order."""
    T, k = expert.shape
    return sorted((int(expert[t, j]), t, j) for t in range(T) for j in range(k) if expert[t, j] >= 0)


def check_inverse(plan):
    """Every kept assignment has a row of its own that names its token; every other row is empty."""
    homes = {}
    for t, row in enumerate(plan.slot.tolist()):
        for j, home in enumerate(row):
            assert (home >= 0) == (int(plan.expert[t, j]) >= 0)
            if home >= 0:
                assert home not in homes
                homes[home] = t
    assert plan.token.tolist() == [homes.get(r, -1) for r in range(len(plan.token))]


@given(assignments())
def test_ragged_plan(case):
    expert, E = case
    plan, rows = Plan.of(expert, E), by_hand(expert, E)
    assert plan.token.tolist() == [t for _, t, _ in rows] + [-1] * (expert.numel() - len(rows))
    assert all(int(plan.slot[t, j]) == r for r, (_, t, j) in enumerate(rows))
    assert plan.counts.tolist() == [sum(e == wanted for e, _, _ in rows) for wanted in range(E)]
    assert plan.token.dtype == plan.slot.dtype == plan.counts.dtype == torch.int64
    assert plan.capacity is None
    check_inverse(plan)


@pytest.mark.parametrize("capacity", [None, 3])
def test_results_are_aligned_as_compiled_code_takes_them_to_be(capacity):
    plan = Plan.of(torch.tensor([[1, 0], [1, -1], [0, 1]]), 2, capacity)
    results = {name: getattr(plan, name) for name in ("token", "slot", "counts")}
    results["weight"] = encode_weight(torch.ones(3, 2), plan)
    assert {name: t.data_ptr() % 16 for name, t in results.items()} == dict.fromkeys(results, 0)


@pytest.mark.parametrize("num_experts", [3, (1 << 16) - 1, 1 << 16, 1 << 20])
def test_the_order_of_any_number_of_experts(num_experts):
    expert = torch.randint(-1, num_experts, (40, 2), generator=torch.Generator().manual_seed(0))
    expert[0], expert[1] = -1, num_experts - 1
    kept = [(e, row // 2) for row, e in enumerate(expert.flatten().tolist()) if e >= 0]
    wanted = [token for _, token in sorted(kept)]
    assert Plan.of(expert, num_experts).token.tolist() == wanted + [-1] * (80 - len(wanted))


@given(assignments(), st.integers(0, 3))
def test_padded_plan(case, spare):
    expert, E = case
    ragged = Plan.of(expert, E)
    capacity = int(ragged.counts.max()) + spare
    plan = Plan.of(expert, E, capacity)
    assert plan.capacity == capacity
    assert plan.counts.tolist() == [capacity] * E
    check_inverse(plan)
    assert torch.equal(plan.expert, expert)
    for e, block in enumerate(plan.token.reshape(E, capacity).tolist()):
        tokens = [t for wanted, t, _ in by_hand(expert, E) if wanted == e]
        assert block == tokens + [-1] * (capacity - len(tokens))


@given(assignments(), st.integers(0, 2), st.integers(0, 2))
def test_padding_twice_is_padding_once_to_the_larger(case, spare, more):
    expert, E = case
    first = int(Plan.of(expert, E).counts.max()) + spare
    once, twice = Plan.of(expert, E, first + more), Plan.of(expert, E, first).padded(first + more)
    assert torch.equal(once.token, twice.token)
    assert torch.equal(once.slot, twice.slot)
    assert torch.equal(once.counts, twice.counts)


@given(assignments())
def test_trimmed_plan_has_no_empty_row(case):
    expert, E = case
    plan = Plan.of(expert, E)
    trimmed = plan.trimmed(int(plan.counts.sum()))
    assert trimmed.token.tolist() == [t for t in plan.token.tolist() if t >= 0]
    assert torch.equal(trimmed.slot, plan.slot)
    check_inverse(trimmed)


@given(assignments(), st.sampled_from([None, 0, 2]))
def test_compact_plan_is_the_ragged_one_without_empty_rows(case, spare):
    expert, E = case
    ragged = Plan.of(expert, E)
    plan = Plan.of(expert, E, None if spare is None else int(ragged.counts.max()) + spare).compact()
    wanted = ragged.trimmed(int(ragged.counts.sum()))
    for found, same in zip(
        (plan.token, plan.slot, plan.counts), (wanted.token, wanted.slot, wanted.counts), strict=True
    ):
        assert torch.equal(found, same)
    assert plan.capacity is None
    check_inverse(plan)


def test_the_check_of_the_inverse_can_fail():
    plan = Plan.of(torch.tensor([[0], [1]]), 2)
    plan.slot[0, 0] = 1
    with pytest.raises(AssertionError):
        check_inverse(plan)


@given(assignments())
def test_load(case):
    expert, E = case
    assert load(expert, E).tolist() == [expert.flatten().tolist().count(e) for e in range(E)]


@pytest.mark.parametrize("expert", [torch.zeros(3, dtype=torch.int64), torch.zeros(3, 1), torch.zeros(3, 1).int()])
def test_only_int64_of_two_axes(expert):
    with pytest.raises(ValueError, match="int64"):
        Plan.of(expert, 2)


@given(st.lists(st.integers(0, 3), min_size=24, max_size=24), st.permutations("abc"))
def test_reorder_against_lists_of_blocks(sizes, order):
    counts = torch.tensor(sizes).reshape(2, 3, 4)
    rows = int(counts.sum())
    labels, first = {}, 0  # the rows of block (i, j, l), as they lie
    for i in range(2):
        for j in range(3):
            for n in range(4):
                labels[i, j, n] = list(range(first, first + int(counts[i, j, n])))
                first += int(counts[i, j, n])
    axes = [list("abc").index(name) for name in order]
    shape = [(2, 3, 4)[axis] for axis in axes]
    wanted, wanted_sizes = [], []
    for place in range(24):
        old, rest = [0, 0, 0], place
        for axis, length in reversed(list(zip(axes, shape, strict=True))):
            old[axis], rest = rest % length, rest // length
        wanted += labels[tuple(old)]
        wanted_sizes.append(len(labels[tuple(old)]))
    index, new = reorder(counts, f"a b c -> {' '.join(order)}", rows)
    assert index.tolist() == wanted
    assert new.flatten().tolist() == wanted_sizes
    assert list(new.shape) == shape
    back = invert(index)
    assert back[index].tolist() == index[back].tolist() == list(range(rows))


def test_reorder_of_nothing():
    index, counts = reorder(torch.zeros(2, 3, dtype=torch.int64), "a b -> b a", rows=0)
    assert index.tolist() == []
    assert counts.shape == (3, 2)
    assert invert(index).tolist() == []


@pytest.mark.parametrize("capacity", [None, 3])
def test_opcheck(capacity):
    torch.library.opcheck(_plan, (torch.tensor([[0, 2], [-1, 1], [2, 0]]), 4, capacity))
