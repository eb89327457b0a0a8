"""The exchange against a simulation on one process, and on proper subgroups, forward and backward."""

import pytest
import torch
import torch.distributed as dist
from ranks import run
from turnout.dispatch import all_to_all, exchange_sizes
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
