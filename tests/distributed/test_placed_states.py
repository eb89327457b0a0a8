"""Placements: bytes that travel, state dicts and checkpoints in the order of ids, and what is refused."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, build, tokens, whole
from ranks import run
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from turnout.models import checkpoint
from turnout.moe import (
    aux_loss,
    fully_shard_experts,
    parallelize,
    param_groups,
    place_experts,
    sync_gradients,
)

BACKWARDS = list(reversed(range(EXPERTS)))
MIXED = [2, 0, 7, 5, 1, 3, 4, 6]


def mesh_of(shape=(4,), names=("ep",)):
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def trained(mesh, steps: int = 2, shard: bool = False, orders=()) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model after some steps of AdamW, with these orders of the first and second layer before each."""
    model = parallelize(build(), mesh)
    if shard:
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        fully_shard(fully_shard_experts(model, mesh), mesh=mesh._flatten("all"))
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    for number in range(steps):
        for order in orders[number : number + 1]:
            place_experts(model, mesh, optimizer, order)
        step(model, mesh, optimizer, shard)
    return model, optimizer


def step(model, mesh, optimizer, shard: bool = False) -> torch.Tensor:
    x = tokens(20).chunk(4)[dist.get_rank()]
    optimizer.zero_grad()
    y = model(x)
    (y.square().mean() + aux_loss(model)).backward()
    if not shard:
        sync_gradients(model, mesh)
    optimizer.step()
    return y.detach()


def everything(model, optimizer) -> dict[str, torch.Tensor]:
    """All of model and optimizer by name, whole."""
    held = {name: whole(t) for name, t in model.state_dict().items()}
    state = states.get_optimizer_state_dict(model, optimizer)["state"]
    return held | {f"{name} {k}": whole(v) for name, each in state.items() for k, v in each.items() if v.ndim}


def same(found: dict, expected: dict, tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, t in found.items():
        torch.testing.assert_close(t, expected[name], rtol=tolerance, atol=tolerance, msg=name)


@contextmanager
def counting():
    """Bytes that this rank sends to others, and exchanges."""
    sent, exchange = [0, 0], dist.all_to_all_single

    def counted(out, x, recv=None, send=None, group=None, **options):
        rank = dist.get_rank(group)
        if send is not None and x.dtype == torch.uint8:
            sent[0] += (sum(send) - send[rank]) * x.stride(0)
            sent[1] += 1
        return exchange(out, x, recv, send, group=group, **options)

    dist.all_to_all_single = counted
    try:
        yield sent
    finally:
        dist.all_to_all_single = exchange


def bytes_of_moves() -> None:
    mesh, rank = mesh_of(), dist.get_rank()
    model, optimizer = trained(mesh)
    layer = model[1]
    one = 8 * sum(p[0].numel() for p in layer.experts.parameters())
    storage = [p.to_local().data_ptr() for p in layer.experts.parameters()]
    for order, gradients in [
        ([1, 0, 2, 3, 4, 5, 6, 7], 0),  # within a rank
        ([1, 4, 2, 3, 0, 5, 6, 7], 0),
        ([1, 4, 2, 3, 0, 5, 6, 7], 0),  # as it is
        (MIXED, 1),
        (list(range(EXPERTS)), 0),
    ]:
        optimizer.zero_grad()
        if gradients:
            step(model, mesh, optimizer)
        leave = [e for slot, e in enumerate(layer.experts.order) if slot // 2 == rank and order.index(e) // 2 != rank]
        with counting() as sent:
            place_experts(model, mesh, optimizer, {"1": order})
        assert sent[0] == len(leave) * one * (3 + gradients)  # parameter and two of AdamW
        assert sent[1] <= 1
        assert list(layer.experts.owned) == order[2 * rank : 2 * rank + 2]
    assert [p.to_local().data_ptr() for p in layer.experts.parameters()] == storage
    assert layer.experts.placement is None


def test_only_experts_that_change_rank_travel():
    run(4, bytes_of_moves)


def in_order_of_ids(shape, names, shard: bool) -> None:
    mesh = mesh_of(shape, names)
    model, optimizer = trained(mesh, shard=shard)
    expected, first = everything(model, optimizer), model[1]
    held = [copy.deepcopy(each.state_dict()) for each in (model, optimizer)]
    parameters = {name: t for name, t in expected.items() if " " not in name}
    place_experts(model, mesh, optimizer, {"1": BACKWARDS, "3": MIXED})
    assert (first.experts.order, model[3].experts.order) == (tuple(BACKWARDS), tuple(MIXED))
    same(everything(model, optimizer), expected)
    whole_tensors = states.StateDictOptions(full_state_dict=True)
    states_of_all = copy.deepcopy(states.get_optimizer_state_dict(model, optimizer, options=whole_tensors))

    def back(load_model, load_optimizer) -> None:
        step(model, mesh, optimizer, shard)
        changed = everything(model, optimizer)
        assert all(not torch.equal(changed[name], t) for name, t in expected.items())
        load_model()
        load_optimizer()
        same(everything(model, optimizer), expected)
        place_experts(model, mesh, optimizer, {"3": BACKWARDS})

    def load_dtensors() -> None:  # from before the placement
        optimizer.load_state_dict(copy.deepcopy(held[1]))

    def load_whole() -> None:
        states.set_optimizer_state_dict(model, optimizer, states_of_all, options=whole_tensors)

    back(lambda: model.load_state_dict(held[0]), load_dtensors)
    back(lambda: states.set_model_state_dict(model, parameters, options=whole_tensors), load_whole)
    if shard:
        return
    back(lambda: model.load_state_dict(parameters), load_dtensors)
    y, twin = torch.randn(3, WIDTH).double(), build()[1]
    twin.load_state_dict({n.removeprefix("1."): t for n, t in parameters.items() if n.startswith("1.")})
    for expert in first.experts.owned:
        torch.testing.assert_close(first.experts[expert](y), twin.experts[expert](y))
    with pytest.raises(IndexError, match="this rank holds"):
        first.experts[next(e for e in range(EXPERTS) if e not in first.experts.owned)]
    first.experts.reset_parameters()
    twin.experts.reset_parameters()
    for name, t in first.experts.state_dict().items():
        assert torch.equal(whole(t), twin.experts.get_parameter(name)), name


@pytest.mark.parametrize(
    ("shape", "names", "shard"),
    [
        ((2, 2), ("edp", "ep"), True),
        ((4,), ("ep",), False),
    ],
)
def test_state_dicts_are_in_the_order_of_ids(shape, names, shard):
    run(4, in_order_of_ids, shape, names, shard)


def saved_and_loaded(folder) -> None:
    """A checkpoint saved under a placement loads under another one, on another mesh, and without one."""
    mesh = mesh_of((2, 2), ("edp", "ep"))
    model, optimizer = trained(mesh, 3, orders=[{"1": MIXED}, {"3": BACKWARDS}])
    expected = everything(model, optimizer)
    path = checkpoint.save(folder, model, optimizer, step=3)
    following = step(model, mesh, optimizer)
    other = mesh_of((2, 2), ("node", "local"))
    model, _ = trained(other, 1, orders=[{"1": BACKWARDS}])
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)  # made after the placement
    checkpoint.load(path, model, optimizer)
    same(everything(model, optimizer), expected)
    torch.testing.assert_close(step(model, other, optimizer), following, rtol=1e-9, atol=1e-9)
    with checkpoint.AsyncCheckpointer(folder) as checkpointer:
        place_experts(model, other, optimizer, {"1": MIXED, "3": MIXED})
        expected = everything(model, optimizer)
        checkpointer.save(model, optimizer, 4)
        step(model, other, optimizer)
    model, optimizer = trained(mesh, 0)
    checkpoint.load(checkpoint.newest(folder), model, optimizer)
    same(everything(model, optimizer), expected)


def test_a_checkpoint_loads_under_any_placement(tmp_path):
    run(4, saved_and_loaded, tmp_path)
