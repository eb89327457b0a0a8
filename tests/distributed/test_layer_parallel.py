"""Any number of ranks computes what one computes: outputs, input gradients, every parameter's gradient."""

import math

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, build, close, crowd, tokens, whole
from ranks import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import FlatDispatcher, OverlapDispatcher
from turnout.moe import Balance, Capacity, MoE, aux_loss, parallelize, sync_gradients

pytestmark = pytest.mark.sampled

MESHES = [(1, 2), (1, 4), (2, 2), (4, 1)]
SHARDS = {2: [[6, 3], [0, 5]], 4: [[5, 0, 9, 3], [4, 4, 4, 4]]}


def mesh_of(shape: tuple[int, int]):
    return init_device_mesh("cpu", shape, mesh_dim_names=("edp", "ep"))


def shard(x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    return x.split(sizes)[dist.get_rank()].clone()


def one_rank(x, model, masked=None):
    """Output, x gradient, all parameter gradients, and the losses, of the mean over tokens."""
    x = x.clone().requires_grad_()
    y = x
    for layer in model:
        y = layer(y, masked) if isinstance(layer, MoE) else layer(y)
    aux = aux_loss(model)
    (y.square().sum() / len(x) + aux).backward()
    return y.detach(), x.grad, {n: p.grad for n, p in model.named_parameters()}, aux.detach()


def compare(model, mesh, x, sizes, expected, masked=None):
    y1, gx1, grads1, aux1 = expected
    ranks = dist.get_world_size()
    mine = shard(x, sizes).requires_grad_()
    y = mine
    for layer in model:
        y = layer(y, None if masked is None else shard(masked, sizes)) if isinstance(layer, MoE) else layer(y)
    aux = aux_loss(model)
    (y.square().sum() * ranks / len(x) + aux).backward()
    sync_gradients(model, mesh)
    mean = aux.detach().clone()
    dist.all_reduce(mean)
    close(mean / ranks, aux1, 1e-12, "aux loss")
    close(y.detach(), shard(y1, sizes), 1e-12, "y")
    close(mine.grad / ranks, shard(gx1, sizes), 1e-12, "x.grad")
    for name, p in model.named_parameters():
        close(whole(p.grad), grads1[name], 1e-12, name)


def every_case(shape, names=("edp", "ep"), dispatcher="auto", degree=None):
    def spread(model, mesh):
        for layer in parallelize(model, mesh, dispatcher):
            if degree is not None and isinstance(layer, MoE):
                layer.dispatcher = OverlapDispatcher(layer.dispatcher, degree)
        return model

    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for sizes in SHARDS[math.prod(shape)]:
        x = tokens(sum(sizes))
        masked = torch.arange(len(x)) % 4 > 0
        for options in ({}, {"capacity": Capacity(float(EXPERTS), pad=True)}, {"capacity": float(EXPERTS)}):
            compare(spread(build(**options), mesh), mesh, x, sizes, one_rank(x, build(**options)))
        compare(spread(build(), mesh), mesh, x, sizes, one_rank(x, build(), masked), masked)
        one, many = build(), build()
        crowd(one)
        crowd(many)
        compare(spread(many, mesh), mesh, x, sizes, one_rank(x, one))


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_many_ranks_equal_one(shape):
    run(shape[0] * shape[1], every_case, shape)


NODES = [((2, 2), ("node", "local")), ((1, 4), ("node", "local")), ((4, 1), ("node", "local"))]


@pytest.mark.parametrize(("shape", "names"), [*NODES, ((2, 2, 1), ("edp", "node", "local"))], ids=str)
def test_many_ranks_by_node_equal_one(shape, names):
    run(4, every_case, shape, names, "node")


@pytest.mark.parametrize(("dispatcher", "degree"), [("flat", 2), ("flat", 20), ("2dh", 3), ("node", 4), ("node", 1)])
def test_many_ranks_in_chunks_equal_one(dispatcher, degree):
    run(4, every_case, (2, 2), ("node", "local"), dispatcher, degree)


def swapped_experts():
    """The negative control: two experts exchanged, and the comparison above must notice."""
    mesh, sizes = mesh_of((1, 4)), SHARDS[4][0]
    x, model = tokens(sum(sizes)), build()
    expected = one_rank(x, build())
    with torch.no_grad():
        w = model[1].experts.w_up
        w[[0, 1]] = w[[1, 0]]
    noticed = False
    try:
        compare(parallelize(model, mesh), mesh, x, sizes, expected)
    except AssertionError:
        noticed = True
    return noticed


def test_the_comparison_notices_two_swapped_experts():
    assert any(run(4, swapped_experts))


def capped(policy, pad):
    """Capacity is a rule per source rank: the oracle is one rank's layer on each shard by itself."""
    mesh, sizes = mesh_of((1, 4)), [7, 0, 9, 4]
    x = tokens(sum(sizes))
    options = {"capacity": Capacity(0.75, drop=policy, pad=pad), "balance": 0.0}

    def layer():
        torch.manual_seed(3)
        return MoE(WIDTH, 12, EXPERTS, **options).double()

    one, many = layer(), parallelize(nn.ModuleList([layer()]), mesh)[0]
    whole_x, mine = x.clone().requires_grad_(), shard(x, sizes).requires_grad_()
    y1 = torch.cat([one(part) for part in whole_x.split(sizes)])
    y1.square().sum().backward()
    y = many(mine)
    y.square().sum().backward()
    close(y.detach(), shard(y1.detach(), sizes), 1e-12, "y")
    close(mine.grad, shard(whole_x.grad, sizes), 1e-12, "x.grad")
    for name, p in many.experts.named_parameters():
        close(whole(p.grad), dict(one.experts.named_parameters())[name].grad, 1e-12, name)
    return float(many.stats.dropped)


@pytest.mark.parametrize("policy", ["score", "position"])
@pytest.mark.parametrize("pad", [False, True])
def test_capped_runs_equal_the_oracle_that_knows_the_shards(policy, pad):
    assert max(run(4, capped, policy, pad)) > 0


def sequences(balance):
    """Balance losses that promise it do not depend on how sequences are spread over ranks."""
    mesh, sizes = mesh_of((2, 2)), [1, 0, 3, 2]
    x = torch.randn(6, 5, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options = {"balance": Balance(over=balance, z_loss=1e-2)}
    one, many = build(**options), parallelize(build(**options), mesh)
    one(x)
    aux1 = aux_loss(one)
    aux1.backward()
    many(shard(x, sizes))
    aux = aux_loss(many)
    aux.backward()
    sync_gradients(many, mesh)
    mean = aux.detach().clone()
    dist.all_reduce(mean)
    if balance != "local":
        close(mean / 4, aux1.detach(), 1e-13, "aux loss")
        for i in (1, 3):
            close(many[i].gate.weight.grad, one[i].gate.weight.grad, 1e-13, f"gate {i}")
    return float((mean / 4 - aux1.detach()).abs())


@pytest.mark.parametrize("balance", ["global", "sequence", "local"])
def test_balance_losses_do_not_depend_on_the_mesh_where_they_promise_it(balance):
    differs = run(4, sequences, balance)[0]
    assert (differs > 1e-6) == (balance == "local")


def promised_equal():
    """With the promise of equal token numbers a padded exchange asks nobody, and is the same."""
    mesh = mesh_of((1, 4))
    options = {"capacity": Capacity(float(EXPERTS), pad=True)}
    x, sizes = tokens(20), [5] * 4
    model = parallelize(build(**options), mesh, FlatDispatcher(mesh["ep"].get_group(), equal_tokens=True))
    compare(model, mesh, x, sizes, one_rank(x, build(**options)))


def test_padded_exchange_with_equal_tokens():
    run(4, promised_equal)


def node_axes():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    x, sizes = tokens(17), [5, 0, 9, 3]
    compare(parallelize(build(), mesh), mesh, x, sizes, one_rank(x, build()))


def test_the_expert_axis_may_be_given_as_node_and_local():
    run(4, node_axes)


def placed():
    model = parallelize(build(), mesh_of((1, 4)))
    one = build()
    for name, p in model.named_parameters():
        assert torch.equal(whole(p), dict(one.named_parameters())[name]), name
    rank = dist.get_rank()
    x = tokens(3)
    for expert in range(EXPERTS):
        if expert // 2 == rank:
            close(model[1].experts[expert](x).detach(), one[1].experts[expert](x).detach(), 1e-13)
        else:
            with pytest.raises(IndexError, match=f"expert {expert} is on rank {expert // 2}"):
                model[1].experts[expert]


def test_experts_lie_in_global_order_and_remote_ones_name_their_owner():
    run(4, placed)
