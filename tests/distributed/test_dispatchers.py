"""What every dispatcher promises: the order of the rows, a receipt that is good twice, nothing kept between trips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from types import MappingProxyType

import pytest
import torch
import torch.distributed as dist
from ranks import errors, run
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.overrides import TorchFunctionMode
from turnout.dispatch import (
    AutoDispatcher,
    Dispatcher,
    FlatDispatcher,
    HierarchicalDispatcher,
    LocalDispatcher,
    NodeDispatcher,
    OverlapDispatcher,
    Plan,
    Profile,
)
from turnout.dispatch.autoselect.profile import Link

RANKS, EXPERTS, WIDTH = 4, 8, 3
UNEVEN, EVEN = [5, 0, 9, 3], [4, 4, 4, 4]


def all_ranks() -> tuple[Dispatcher, range]:
    return FlatDispatcher(dist.group.WORLD), range(EXPERTS // RANKS)


def promised() -> tuple[Dispatcher, range]:
    return FlatDispatcher(dist.group.WORLD, equal_tokens=True), range(EXPERTS // RANKS)


def nodes(
    *shape: int, kind: type[HierarchicalDispatcher | NodeDispatcher] = HierarchicalDispatcher, **options
) -> Callable[[], tuple[Dispatcher, range]]:
    def make() -> tuple[Dispatcher, range]:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("node", "local"))
        return kind.of(mesh, **options), range(EXPERTS // RANKS)

    return make


def overlapped(inner: Callable[[], tuple[Dispatcher, range]], degree: int) -> Callable[[], tuple[Dispatcher, range]]:
    def make() -> tuple[Dispatcher, range]:
        dispatcher, owned = inner()
        return OverlapDispatcher(dispatcher, degree), owned

    return make


def auto(profile: Profile) -> Callable[[], tuple[Dispatcher, range]]:
    def make() -> tuple[Dispatcher, range]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
        return AutoDispatcher.of(mesh, profile), range(EXPERTS // RANKS)

    return make


FREE = Link(0.0, 0.0, 0.0)


def alone() -> tuple[Dispatcher, range]:
    return LocalDispatcher(), range(EXPERTS)


# name -> (what makes a dispatcher on a rank, tokens of each rank, rows per expert or None, host syncs of a trip there)
DISPATCHERS = MappingProxyType(
    {
        "flat": (all_ranks, UNEVEN, None, ["tolist"]),
        "flat, padded": (all_ranks, UNEVEN, 9, ["tolist"]),
        "flat, equal tokens": (promised, EVEN, 4, []),
        "2dh, 2 x 2": (nodes(2, 2), UNEVEN, None, ["tolist"]),
        "2dh, 1 x 4": (nodes(1, 4), UNEVEN, None, ["tolist"]),
        "2dh, 4 x 1": (nodes(4, 1), UNEVEN, None, ["tolist"]),
        "2dh, padded": (nodes(2, 2), UNEVEN, 9, ["tolist"]),
        "2dh, equal tokens": (nodes(2, 2, equal_tokens=True), EVEN, 4, []),
        "node": (nodes(2, 2, kind=NodeDispatcher), UNEVEN, None, ["tolist"]),
        "node, padded": (nodes(2, 2, kind=NodeDispatcher), UNEVEN, 9, ["tolist"]),
        "overlap, flat": (overlapped(all_ranks, 3), UNEVEN, None, ["tolist"]),
        "overlap, flat, padded": (overlapped(all_ranks, 4), UNEVEN, 9, ["tolist"]),
        "overlap, flat, equal tokens": (overlapped(promised, 3), EVEN, 4, []),
        "overlap, 2dh": (overlapped(nodes(2, 2), 2), UNEVEN, None, ["tolist"]),
        "overlap, 2dh, equal tokens": (overlapped(nodes(2, 2, equal_tokens=True), 20), EVEN, 4, []),
        "overlap, node": (overlapped(nodes(2, 2, kind=NodeDispatcher), 3), UNEVEN, None, ["tolist"]),
        "overlap, node, padded": (overlapped(nodes(2, 2, kind=NodeDispatcher), 5), UNEVEN, 9, ["tolist"]),
        "overlap, auto": (overlapped(auto(Profile(2, 2, FREE, Link(0.0, 0.0, 1.0))), 3), UNEVEN, None, ["tolist"]),
        "auto, 2dh": (auto(Profile(2, 2, FREE, Link(0.0, 1.0, 0.0))), UNEVEN, None, ["tolist"]),
        "auto, node": (auto(Profile(2, 2, FREE, Link(0.0, 0.0, 1.0))), UNEVEN, 9, ["tolist"]),
        "local": (alone, UNEVEN, None, ["__bool__"]),  # on a CPU alone: it looks for NaN where looking is free
        "local, padded": (alone, UNEVEN, 9, ["__bool__"]),
    }
)
NAMES = pytest.mark.parametrize("name", DISPATCHERS)


def tickets(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """expert [T, 3] with drops, and weight [T, 3], 0 where dropped."""
    g = torch.Generator().manual_seed(seed)
    expert = torch.rand(tokens, EXPERTS, generator=g).argsort(1)[:, :3].contiguous()
    expert[torch.rand(tokens, 3, generator=g) < 0.2] = -1
    weight = torch.rand(tokens, 3, generator=g, dtype=torch.float64)
    return expert, torch.where(expert < 0, 0.0, weight)


def tokens_of(rank: int, tokens: int, seed: int) -> Tensor:
    """Rows that say whose they are: 1 + 100 * rank + place, and noise."""
    x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(10 * seed + rank), dtype=torch.float64)
    x[:, 0] = 1 + 100 * rank + torch.arange(tokens)
    return x


def load_of(name: str, seed: int = 0):
    """The dispatcher on this rank, its experts, the ranks that send to it, this rank's x, plan and weight."""
    make, sizes, capacity, _ = DISPATCHERS[name]
    dispatcher, owned = make()
    rank = dist.get_rank()
    if make is alone:
        sources = [rank]
    else:
        owned, sources = range(rank * len(owned), (rank + 1) * len(owned)), list(range(RANKS))
    expert, weight = tickets(sizes[rank], seed=10 * seed + rank)
    return dispatcher, owned, sources, tokens_of(rank, sizes[rank], seed), Plan.of(expert, EXPERTS, capacity), weight


def check_rows(name: str) -> None:
    """Rows lie by (local expert, source rank, source token), each beside its weight, padding being zero."""
    dispatcher, owned, sources, x, plan, weight = load_of(name)
    rows, weights, counts, _ = dispatcher.dispatch(x, plan, weight)
    _, sizes, capacity, _ = DISPATCHERS[name]
    expected, number = [], []
    for e in owned:
        first = len(expected)
        for source in sources:
            expert, weight = tickets(sizes[source], seed=source)
            theirs = tokens_of(source, sizes[source], seed=0)
            mine = [(theirs[t], weight[t, j]) for t in range(len(expert)) for j in range(3) if expert[t, j] == e]
            padding = [(torch.zeros(WIDTH).double(), torch.zeros(()).double())] * ((capacity or 0) - len(mine))
            expected += mine + padding
        number.append(len(expected) - first)
    assert counts.tolist() == number
    total = sum(number)
    assert rows[:total].tolist() == [row.tolist() for row, _ in expected]
    assert weights[:total].tolist() == [float(w) for _, w in expected]


@NAMES
def test_rows_lie_by_expert_then_source_then_token(name):
    run(RANKS, check_rows, name)


def scaled(owned: range):
    """Experts that each do something distinct: expert e multiplies by e + 1, and by the row's weight."""

    def experts(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        spare = len(rows) - int(counts.sum())
        factor = torch.repeat_interleave(torch.tensor([*owned]) + 1.0, counts)
        factor = torch.cat([factor, torch.full((spare,), float("nan"))]).double()  # what nobody may read
        return rows * (factor * weight).unsqueeze(1)

    return experts


def by_hand(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    return x * torch.where(expert < 0, 0.0, weight * (expert + 1)).sum(1, keepdim=True)


def close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, rtol=1e-13, atol=0)


def check_trip(name: str) -> None:
    dispatcher, owned, _, x, plan, weight = load_of(name)
    leaves = [t.clone().requires_grad_() for t in (x, weight, x, weight)]
    y = dispatcher(leaves[0], plan, leaves[1], scaled(owned))
    expected = by_hand(leaves[2], plan.expert, leaves[3])
    assert close(y, expected)
    toward = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    y.backward(toward)
    expected.backward(toward)
    assert close(leaves[0].grad, leaves[2].grad)
    assert close(leaves[1].grad, leaves[3].grad)
    if len(x):
        assert not close(y, by_hand(x.flip(0), plan.expert, weight))
        assert not close(y, by_hand(x, torch.where(plan.expert < 0, -1, EXPERTS - 1 - plan.expert), weight))


@NAMES
def test_the_trip_and_its_gradients(name):
    run(RANKS, check_trip, name)


def check_in_flight(name: str) -> None:
    """Two trips that overlap, the first come home twice: what each would be alone."""
    dispatcher, owned, _, *first = load_of(name)
    *_, x, plan, weight = load_of(name, seed=1)
    experts = scaled(owned)
    a = dispatcher.dispatch(*first)
    b = dispatcher.dispatch(x, plan, weight)
    home_b = dispatcher.combine(experts(b.rows, b.weight, b.counts), b.receipt)
    home_a = dispatcher.combine(experts(a.rows, a.weight, a.counts), a.receipt)
    again = dispatcher.combine(2 * experts(a.rows, a.weight, a.counts), a.receipt)
    assert close(home_a, by_hand(first[0], first[1].expert, first[2]))
    assert close(home_b, by_hand(x, plan.expert, weight))
    assert torch.equal(again, 2 * home_a)
    if len(x):
        assert not close(home_a, home_b)
    with pytest.raises(FrozenInstanceError):
        dispatcher.something = 1  # nowhere to keep what would belong to one of the trips


@NAMES
def test_two_trips_in_flight_and_a_receipt_used_twice(name):
    run(RANKS, check_in_flight, name)


class Waits(TorchFunctionMode):
    """The calls that wait for the device, or whose shape depends on what is in it."""

    READS = frozenset(
        ["item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "numpy", "cpu"]
    )
    SHAPES = frozenset(["nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"])

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        by_mask = name in ("__getitem__", "__setitem__") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in (args[1] if type(args[1]) is tuple else args[1:2])
        )
        if (
            name in self.READS | self.SHAPES
            or by_mask
            or (name == "repeat_interleave" and kwargs.get("output_size") is None)
        ):
            self.seen.append(name)
        return func(*args, **kwargs)


def check_waits(name: str) -> None:
    *_, waits = DISPATCHERS[name]
    dispatcher, _, _, x, plan, weight = load_of(name)
    dispatcher(x, plan, weight, lambda rows, weight, counts: rows)  # auto chooses on its first trip, once
    with Waits() as there:
        batch = dispatcher.dispatch(x, plan, weight)
    assert there.seen == waits
    with Waits() as back:
        dispatcher.combine(batch.rows, batch.receipt)
    assert back.seen == []
    with Waits() as whole:
        dispatcher(x, plan, weight, lambda rows, weight, counts: rows)
    assert whole.seen == waits
    with Waits() as planning:
        Plan.of(plan.expert, EXPERTS, plan.capacity)
    assert planning.seen == []


@NAMES
def test_a_trip_waits_for_the_host_once_at_most(name):
    run(RANKS, check_waits, name)


def test_what_counts_waits_can_count():
    x = torch.arange(3)
    with Waits() as waits:
        x[x > 1]
        x.sum().item()
        x.repeat_interleave(x)
        bool(x.any())
        x[1], x + 1, x.repeat_interleave(x, output_size=3)
    assert waits.seen == ["__getitem__", "item", "repeat_interleave", "__bool__"]


def other_width(name: str) -> None:
    dispatcher, _, _, x, plan, weight = load_of(name)
    dispatcher.dispatch(x[:, : WIDTH - (dist.get_rank() == 2)], plan, weight)


@pytest.mark.parametrize("name", ["flat", "2dh, 2 x 2", "2dh, 1 x 4", "2dh, 4 x 1"])
def test_ranks_of_different_width_all_raise(name):
    for error in errors(RANKS, other_width, name):
        assert error.startswith("DispatchError: ranks differ in the model width: [3, 3, 2, 3]"), error
