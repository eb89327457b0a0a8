"""The exchange against a simulation on one process, and on proper subgroups, forward and backward."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import run
from turnout.dispatch import all_to_all, all_to_all_two_phase, exchange_sizes, gather, scatter
from turnout.dispatch.collectives import all_reduce

SIZES = {  # [source][destination]
    "uneven": [[1, 2, 0, 3], [0, 0, 0, 0], [4, 0, 1, 1], [2, 2, 2, 2]],
    "one sender": [[5, 0, 2, 1], [0] * 4, [0] * 4, [0] * 4],
    "nothing": [[0] * 4] * 4,
}


def sent(rank: int, rows: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Rows that say whose they are: 100 * rank + row, and further entries by place."""
    base = (100 * rank + torch.arange(rows)).to(torch.float64)
    return (
        base.reshape(-1, *[1] * len(shape)) + torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape) / 64
    ).to(dtype)


def expected(sizes, rank, *shape, dtype=torch.float64):
    """What lies on `rank` afterwards: of each source, its block for this rank."""
    blocks = [sent(s, sum(row), *shape, dtype=dtype).split(row)[rank] for s, row in enumerate(sizes)]
    return torch.cat(blocks)


def exchange(sizes):
    rank = dist.get_rank()
    send, recv = sizes[rank], [row[rank] for row in sizes]
    for shape, dtype in (((3,), torch.float64), ((), torch.float32), ((2, 2), torch.bfloat16), ((2,), torch.int64)):
        x = sent(rank, sum(send), *shape, dtype=dtype)
        (out,) = all_to_all(x, send=send, recv=recv, group=None)
        assert torch.equal(out, expected(sizes, rank, *shape, dtype=dtype)), (shape, dtype)
    a, b = sent(rank, sum(send), 3).requires_grad_(), sent(rank, sum(send)).requires_grad_()
    out_a, out_b = all_to_all(a, b, send=send, recv=recv, group=None)
    assert torch.equal(out_b.detach(), expected(sizes, rank))
    # Each receiver multiplies by its rank + 1: the gradient says where a row has been.
    ((rank + 1) * (out_a.sum() + 2 * out_b.sum())).backward()
    been = torch.cat([torch.full((n,), w + 1.0, dtype=torch.float64) for w, n in enumerate(send)])
    assert torch.equal(a.grad, been.unsqueeze(1).expand(-1, 3))
    assert torch.equal(b.grad, 2 * been)


@pytest.mark.parametrize("case", SIZES)
def test_all_to_all_is_the_simulation(case):
    run(4, exchange, SIZES[case])


def equal_blocks():
    rank = dist.get_rank()
    (out,) = all_to_all(sent(rank, 8, 2), group=None)
    assert torch.equal(out, expected([[2] * 4] * 4, rank, 2))
    sizes = torch.arange(8).reshape(2, 4).T + 10 * rank  # a view with strides of its own
    came = exchange_sizes(sizes, None)
    assert came.tolist() == [[rank + 10 * s, rank + 4 + 10 * s] for s in range(4)]


def test_equal_blocks_need_no_sizes_and_views_arrive_in_order():
    run(4, equal_blocks)


def subgroups():
    rank = dist.get_rank()
    groups = [dist.new_group(members) for members in ([0, 2], [1, 3])]
    members, group = ([0, 2], groups[0]) if rank % 2 == 0 else ([1, 3], groups[1])
    x = sent(rank, 3).requires_grad_()
    send, recv = ([1, 2], [1, 1]) if rank == members[0] else ([1, 2], [2, 2])
    (out,) = all_to_all(x, send=send, recv=recv, group=group)
    theirs = [sent(m, 3).split([1, 2])[members.index(rank)] for m in members]
    assert torch.equal(out.detach(), torch.cat(theirs))
    (out * (rank + 1)).sum().backward()
    assert x.grad.tolist() == [members[0] + 1, members[1] + 1, members[1] + 1]  # nobody else's gradient


def test_a_proper_subgroup_keeps_to_itself_on_both_ways():
    run(4, subgroups)


def summed():
    rank = dist.get_rank()
    x = torch.tensor([1.0 + rank], dtype=torch.float64, requires_grad=True)
    objective = all_reduce(x, None).square().sum()  # equal on all ranks: their mean is (1 + 2 + 3 + 4)^2
    objective.backward()
    assert objective.item() == 100
    assert x.grad.item() / 4 == 2 * 10  # averaged over the ranks: the derivative of that mean


def test_all_reduce_is_for_the_mean_over_ranks():
    run(4, summed)


# The rest against what they do to the inputs of all ranks, written down on one process: lists of rows, by rank.
def simulated_all_to_all(inputs, sizes):
    pieces = [x.split(row) for x, row in zip(inputs, sizes, strict=True)]
    return [torch.cat([pieces[source][rank] for source in range(len(inputs))]) for rank in range(len(inputs))]


def simulated_scatter(inputs, sizes, root):
    return list(inputs[root].split(sizes))


def simulated_gather(inputs, sizes, root):
    return [torch.cat(inputs) if rank == root else inputs[rank][:0] for rank in range(len(inputs))]


def against(simulated, function, rows, *arguments, trailing=(3,), dtype=torch.float64):
    """`function(x)` on each rank, `rows` being those of all inputs, forward and backward, against `simulated`."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    inputs = [sent(r, rows[r], *trailing, dtype=dtype).requires_grad_() for r in range(ranks)]
    outputs = simulated(inputs, *arguments)
    x = inputs[rank].detach().clone().requires_grad_()
    out = function(x)
    assert (out.dtype, out.shape) == (dtype, outputs[rank].shape)
    assert torch.equal(out, outputs[rank])
    toward = [sent(r, len(o), *trailing, dtype=dtype) for r, o in enumerate(outputs)]  # each rank has its own
    torch.autograd.backward(outputs, toward)
    out.backward(toward[rank])
    expected_grad = inputs[rank].grad
    assert torch.equal(x.grad, torch.zeros_like(x) if expected_grad is None else expected_grad)


def two_phases(sizes):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sizes = [row[:ranks] for row in sizes[:ranks]]

    def function(x):
        (out,), recv = all_to_all_two_phase(x, send=sizes[rank], group=None)
        assert recv == [row[rank] for row in sizes]
        return out

    against(simulated_all_to_all, function, [sum(row) for row in sizes], sizes)
    a, b = sent(rank, sum(sizes[rank]), 2), torch.arange(sum(sizes[rank]))
    came, _ = all_to_all_two_phase(a, b, send=sizes[rank], group=None)
    assert [t.shape[1:] for t in came] == [(2,), ()]
    assert came[1].dtype == torch.int64


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("case", SIZES)
def test_two_phases_are_the_simulation(case, ranks):
    run(ranks, two_phases, SIZES[case])


def equal(ranks):
    for rows in (0, 1, 3):
        sizes = [[rows] * ranks] * ranks
        against(simulated_all_to_all, lambda x: all_to_all(x, group=None)[0], [rows * ranks] * ranks, sizes)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equal_blocks_are_the_simulation(ranks):
    run(ranks, equal, ranks)


def one_sided(ranks):
    for sizes in ([2, 0, 3, 1], [0, 0, 0, 4], [1, 1, 1, 1], [0, 0, 0, 0]):
        mine = sizes[-ranks:]
        for root in range(ranks):
            how = {"sizes": mine, "root": root, "group": None}
            whole = [sum(mine) if rank == root else 0 for rank in range(ranks)]
            for trailing, dtype in (((3,), torch.float64), ((), torch.float32), ((2, 2), torch.bfloat16)):
                options = {"trailing": trailing, "dtype": dtype}
                against(simulated_scatter, partial(scatter, **how), whole, mine, root, **options)
                against(simulated_gather, partial(gather, **how), mine, mine, root, **options)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_scatter_and_gather_are_the_simulation(ranks):
    run(ranks, one_sided, ranks)


def there_and_back():
    """The backward of one is the other, in a proper subgroup as well."""
    rank = dist.get_rank()
    groups = [dist.new_group(members) for members in ([0, 2], [1, 3])]
    members, sizes = ([0, 2], [3, 1]) if rank % 2 == 0 else ([1, 3], [0, 2])
    group, me = groups[rank % 2], members.index(rank)
    x = sent(rank, sizes[me], 2).requires_grad_()
    whole = gather(x, sizes, 1, group)
    back = scatter(whole, sizes, 1, group)
    assert torch.equal(back, x)
    toward = sent(rank + 10, sizes[me], 2)
    back.backward(toward)
    assert torch.equal(x.grad, toward)


def test_there_and_back_in_a_subgroup():
    run(4, there_and_back)


def misfits():
    x = torch.zeros(2, 3)
    for wrong in (partial(scatter, sizes=[1, 2, 3], root=0), partial(gather, sizes=[2, 2], root=2)):
        with pytest.raises(ValueError, match="sizes must have a number for each of 2 ranks"):
            wrong(x, group=None)
    with pytest.raises(ValueError, match=r"scatter: x must be \[[40], ...\] on this rank, .* got \(2, 3\)"):
        scatter(x, [1, 3], 0, None)
    with pytest.raises(ValueError, match=r"gather: x must be \[1, ...\] on this rank"):
        gather(x, [1, 1], 0, None)


def test_pieces_that_do_not_fit_are_named():
    run(2, misfits)
