"""`sync_gradients` at the edges: float16 near its largest number, sparse gradients, gradients that ranks lack."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, close, whole
from ranks import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from turnout.moe import GradScaler, MoE, clip_grad_norm_, parallelize, sync_gradients

MESHES = pytest.mark.parametrize("names", [("ep",), ("edp",)])


class Model(nn.Module):
    """An embedding with sparse gradients, a layer, and a part that a rank may leave out."""

    def __init__(self, sparse: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, WIDTH, sparse=sparse)
        self.moe = MoE(WIDTH, 12, EXPERTS, seed=0, balance=0.0)
        self.more, self.never = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: torch.Tensor, more: bool) -> torch.Tensor:
        y = self.moe(self.embedding(ids))
        return self.more(y) if more else y


def large(names):
    """Each rank's gradient is near the largest number of float16, and so is the mean; the sum is not."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=names)
    model = parallelize(Model(sparse=False).half(), mesh)
    for p in model.parameters():
        p.grad = torch.full_like(p, 50000.0)
    sync_gradients(model, mesh)
    for p in model.more.parameters():
        assert bool((p.grad == 50000.0).all())
    for p in model.moe.experts.parameters():
        assert bool((whole(p.grad) == (50000.0 if names == ("edp",) else 25000.0)).all())


@MESHES
def test_float16_is_divided_before_it_is_summed(names):
    run(2, large, names)


def batch(rank: int) -> torch.Tensor:
    return torch.tensor([[3, 5, 5, 7], [5, 9, 0, 0]][rank])


def sparse(names, absent):
    """As one process with all tokens; rows that nobody used are absent, as SparseAdam wants them."""
    mesh, rank = init_device_mesh("cpu", (2,), mesh_dim_names=names), dist.get_rank()
    model, one = parallelize(Model().double(), mesh), Model().double()
    for part in range(2):
        if not (absent and part == 1):
            (one(batch(part), part == 0).square().sum() / 2).backward()
    y = model(batch(rank), rank == 0) if not (absent and rank == 1) else model(batch(1), False) * 0
    y.square().sum().backward()
    if absent and rank == 1:
        model.embedding.weight.grad = None
    sync_gradients(model, mesh)
    grad, expected = model.embedding.weight.grad, one.embedding.weight.grad.coalesce()
    assert grad.is_sparse
    assert grad.coalesce().indices().tolist() == expected.indices().tolist()
    for name, p in one.named_parameters():
        mine = model.get_parameter(name).grad
        assert (mine is None) == (p.grad is None) == name.startswith("never"), name
        if mine is not None:
            close(whole(mine.to_dense() if mine.is_sparse else mine), p.grad.to_dense(), 1e-12, name)
    close(clip_grad_norm_(model, 0.1), clip_grad_norm_(one, 0.1), 1e-12, "norm")
    close(model.embedding.weight.grad.to_dense(), one.embedding.weight.grad.to_dense(), 1e-12, "clipped")
    before = model.embedding.weight.grad.to_dense()
    scaler = GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(torch.optim.SGD(model.parameters(), lr=1.0))
    close(model.embedding.weight.grad.to_dense() * 4, before, 1e-12, "unscaled")


@MESHES
@pytest.mark.parametrize("absent", [False, True])
def test_sparse_and_absent_gradients_are_those_of_one_process(names, absent):
    run(2, sparse, names, absent)


def counted():
    """One collective tells which gradients there are, however many parameters."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    model = parallelize(Model(sparse=False), mesh)
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda x, *args, **options: calls.append(x.dtype) or all_reduce(x, *args, **options)
    model(batch(dist.get_rank()), True).sum().backward()
    calls.clear()
    sync_gradients(model, mesh)
    return calls


def test_one_collective_tells_which_gradients_there_are():
    assert run(2, counted) == [[torch.uint8, torch.float32]] * 2
