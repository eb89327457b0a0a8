"""A token crosses to a node once: what crosses is counted, and the rest is what `FlatDispatcher` does."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import errors, run
from strategies import assignments
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import Dispatcher, FlatDispatcher, NodeDispatcher, Plan
from turnout.dispatch.node import distinct_nodes, numbers_on_node
from turnout.moe import MoE, parallelize

EXPERTS, WIDTH = 12, 5
SHAPES = [(2, 2), (1, 4), (4, 1), (3, 2)]
UNEVEN = [5, 0, 9, 3, 7, 1]
KINDS = ["any", "drops", "one expert", "one node", "mixed k", "nobody"]


def tickets(rank: int, kind: str, k: int, nodes: int) -> tuple[Tensor, Tensor]:
    """expert [T, k] and weight [T, k] of a rank, 0 where dropped."""
    g = torch.Generator().manual_seed(rank)
    tokens = 0 if kind == "nobody" else UNEVEN[rank]
    score = torch.rand(tokens, EXPERTS, generator=g)
    if kind == "one node":  # another one for each token
        held = EXPERTS // nodes
        home = torch.randint(nodes, (tokens, 1), generator=g)
        score[torch.arange(EXPERTS) // held == home] += 1
    if kind == "mixed k":
        k = max(1, k - rank % 3)
    expert = torch.zeros(tokens, 1, dtype=torch.int64) + 4 if kind == "one expert" else score.argsort(1, True)[:, :k]
    if kind == "drops":
        expert = expert.masked_fill(torch.rand(expert.shape, generator=g) < 0.3, -1)
        expert[:1] = -1  # a token that goes nowhere
    weight = torch.rand(expert.shape, generator=g, dtype=torch.float64)
    return expert.contiguous(), torch.where(expert < 0, 0.0, weight)


def trip(dispatcher: Dispatcher, expert: Tensor, weight: Tensor, dtype: torch.dtype, capacity: int | None = None):
    """What the experts got, and the result with all gradients, through experts that are matrices."""
    g = torch.Generator().manual_seed(100 + dist.get_rank())
    x = torch.randn(len(expert), WIDTH, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    toward = torch.randn(len(expert), WIDTH, generator=g, dtype=torch.float64)
    weight = weight.clone().requires_grad_()
    per_rank = EXPERTS // dist.get_world_size()
    matrix = torch.randn(per_rank, WIDTH, WIDTH, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    batch = dispatcher.dispatch(x, Plan.of(expert, EXPERTS, capacity), weight)
    parts = batch.rows.split(batch.counts.tolist())
    rows = torch.cat([part @ m for part, m in zip(parts, matrix.unbind(0), strict=True)])
    y = dispatcher.combine((rows * batch.weight.unsqueeze(1)).to(dtype), batch.receipt)
    y.backward(toward.to(dtype))
    batch = [batch.rows.detach(), batch.weight.detach(), batch.counts]
    return batch, [y.detach(), x.grad, weight.grad, matrix.grad]


def both(shape: tuple[int, int]) -> tuple[NodeDispatcher, FlatDispatcher]:
    return NodeDispatcher.of(init_device_mesh("cpu", shape, mesh_dim_names=("node", "local"))), FlatDispatcher(
        dist.group.WORLD
    )


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b.numel()]
    return max((float((a.double() - b.double()).abs().max()) for a, b in pairs), default=0.0)


def as_flat(shape: tuple[int, int]) -> None:
    node, flat = both(shape)
    for kind, k in [*((kind, 3) for kind in KINDS), *(("any", k) for k in (1, 2, 4, EXPERTS))]:
        for capacity in (None, 9):
            expert, weight = tickets(dist.get_rank(), kind, k, shape[0])
            batch, found = trip(node, expert, weight, torch.float64, capacity)
            flat_batch, expected = trip(flat, expert, weight, torch.float64, capacity)
            assert same_bits(batch, flat_batch), (kind, k)
            assert largest_error(found, expected) < 1e-12, (kind, k)
            again, repeated = trip(node, expert, weight, torch.float64, capacity)
            assert same_bits(batch + found, again + repeated), (kind, k)
    assert float(found[0].abs().sum()) > 1 or not len(expert)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_batch_is_that_of_flat_and_the_results_are_to_rounding(shape):
    run(shape[0] * shape[1], as_flat, shape)


def in_bfloat16(shape: tuple[int, int]) -> None:
    """Each row that travels is rounded once more than on one rank, the sums are not."""
    node, flat = both(shape)
    expert, weight = tickets(dist.get_rank(), "any", 6, shape[0])
    batch, found = trip(node, expert, weight.float(), torch.bfloat16)
    flat_batch, expected = trip(flat, expert, weight.float(), torch.bfloat16)
    assert same_bits(batch, flat_batch)
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    scale = max((float(t.abs().max()) for t in expected if t.numel()), default=0.0)
    assert largest_error(found, expected) <= scale * 2**-7


def test_bfloat16():
    run(4, in_bfloat16, (2, 2))


def wide_sums() -> None:
    """256 + 1 + 1 on one node is 258, which bfloat16 can hold, but 257 it cannot."""
    node, _ = both((2, 2))
    expert = torch.tensor([[0, 1, 2, 3]])  # of 12: all on node 0
    x, weight = torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([[256.0, 1.0, 1.0, 0.0]])
    y = node(x, Plan.of(expert, EXPERTS), weight, lambda rows, weight, counts: rows * weight.unsqueeze(1).bfloat16())
    assert y.tolist() == [[258.0]]


def test_sums_inside_the_node_are_wide():
    run(4, wide_sums)


def crossings(shape: tuple[int, int], kind: str, k: int) -> tuple[int, list[int]]:
    """Distinct (token, other node) pairs of this rank's routing, and payload rows sent to other nodes, by exchange."""
    node, _ = both(shape)
    here, counted, exchange = dist.get_rank(node.node), [], dist.all_to_all_single

    def counting(out, tensor, recv, send, group, **options):
        if group is node.node and tensor.ndim == 2 and tensor.shape[1] == WIDTH:
            counted.append(sum(send) - send[here])
            assert tensor.shape[0] == sum(send)
        return exchange(out, tensor, recv, send, group=group, **options)

    def passing(out, tensor, recv=None, send=None, group=None, **options):
        return (exchange if send is None else counting)(out, tensor, recv, send, group=group, **options)

    dist.all_to_all_single = passing  # in this process alone, which ends with the test
    expert, weight = tickets(dist.get_rank(), kind, k, shape[0])
    trip(node, expert, weight, torch.float64)
    held = EXPERTS // shape[0]
    return len(
        {(t, int(e) // held) for t, row in enumerate(expert) for e in row if e >= 0 and e // held != here}
    ), counted


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "k"), [("any", 3), ("any", EXPERTS), ("drops", 4), ("one node", 3)])
def test_rows_cross_once_for_each_token_and_other_node(shape, kind, k):
    found = run(shape[0] * shape[1], crossings, shape, kind, k)
    pairs = sum(pairs for pairs, _ in found)
    there, back, gradient_there, gradient_back = (sum(rows) for rows in zip(*(rows for _, rows in found), strict=True))
    assert there == back == gradient_there == gradient_back == pairs
    assert all(rows[0] == pairs for pairs, rows in found)  # nor does one rank send for another
    assert (pairs > 0) == (shape[0] > 1)


@given(assignments(max_experts=12), st.data())
def test_each_token_visits_its_nodes_once_and_each_assignment_is_fanned_out_once(case, data):
    expert, E = case
    nodes = data.draw(st.sampled_from([n for n in range(1, E + 1) if E % n == 0]))
    held = E // nodes
    visited = distinct_nodes(expert, nodes, held)
    assert visited.shape == (len(expert), min(nodes, expert.shape[1]))
    for row, there in zip(expert.tolist(), visited.tolist(), strict=True):
        assert sorted(n for n in there if n >= 0) == sorted({e // held for e in row if e >= 0})
    plan, found = Plan.of(visited, nodes), []
    rows = plan.token[: int(plan.counts.sum())].split(plan.counts.tolist())
    for node, token in enumerate(rows):
        mine = numbers_on_node(expert[token], node, held)
        assert (mine < held).all()
        assert (mine >= 0).any(1).all()  # no row for nothing
        found += [(int(t), node * held + int(e)) for t, row in zip(token, mine, strict=True) for e in row if e >= 0]
    assert sorted(found) == sorted((t, e) for t, row in enumerate(expert.tolist()) for e in row if e >= 0)


def fault(what: str) -> None:
    """Rank 2 of 4, (1, 0), does something else than the others."""
    node, _ = both((2, 2))
    odd = dist.get_rank() == 2
    x, weight = torch.ones(3, WIDTH - (odd and what == "width"), requires_grad=True), torch.ones(3, 2)
    if odd and what == "refusal":
        node.refuse(EXPERTS, x.device)
        raise ValueError("an error of its own")
    if odd and what == "nan":
        weight[1, 1] = float("nan")
    capacity = 3 if odd and what == "capacity" else None
    with torch.set_grad_enabled(not (odd and what == "grad")):
        x = x.bfloat16() if odd and what == "dtype" else x
        node.dispatch(x, Plan.of(torch.tensor([[0, 11]] * 3), EXPERTS, capacity), weight)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("width", "ranks differ in the model width: [5, 5, 4, 5]"),
        ("dtype", "ranks differ in the dtype"),
        ("grad", "ranks differ in whether a backward will follow: [1, 1, 0, 1]"),
        ("capacity", "some ranks have padded plans and some ragged ones: capacities [-1, -1, 3, -1]"),
        ("nan", "rank 2 of the expert group: NaN"),
        ("refusal", "rank 2 of the expert group raised an error"),
    ],
)
def test_every_rank_raises(what, message):
    found = errors(4, functools.partial(fault, what))
    if what == "refusal":
        assert found.pop(2) == "ValueError: an error of its own"
    for error in found:
        assert error.startswith(f"DispatchError: {message}"), error
    assert len(set(found)) == 1


def by_name() -> list[str]:
    layers = [MoE(WIDTH, 8, EXPERTS, seed=0) for _ in range(3)]
    nodes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    alone = init_device_mesh("cpu", (4, 1, 1), mesh_dim_names=("edp", "node", "local"))
    for layer, mesh, name in zip(layers, (nodes, nodes, alone), ("node", "auto", "node"), strict=True):
        parallelize(nn.ModuleList([layer]), mesh, dispatcher=name)
    return [type(layer.dispatcher).__name__ for layer in layers]


def test_parallelize_knows_it_by_name():
    assert run(4, by_name) == [["NodeDispatcher", "AutoDispatcher", "LocalDispatcher"]] * 4
