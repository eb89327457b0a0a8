"""Ranks that are in different forwards: an error on every rank that names the layers, no mixed rows, no hang."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, close
from ranks import errors, outcomes, run
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from turnout.dispatch import DispatchError, FlatDispatcher, HierarchicalDispatcher
from turnout.moe import Capacity, MoE, parallelize, sync_gradients

WAYS = {
    "flat": {},
    "2dh": {"dispatcher": "2dh"},
    "node": {"dispatcher": "node"},
    "flat, in chunks": {"overlap": 3},
    "node, in chunks": {"dispatcher": "node", "overlap": 2},
    "compressed": {"wire": "bf16"},
    "auto": {"dispatcher": "auto"},
    "split inside": {"etp": True},
    "padded": {"capacity": Capacity(2.0, pad=True)},
    "promised": {"capacity": Capacity(2.0, pad=True), "promise": FlatDispatcher},
    "promised, 2dh": {"capacity": Capacity(2.0, pad=True), "promise": HierarchicalDispatcher},
}
EACH = pytest.mark.parametrize("way", WAYS)


def mesh_for(way: str) -> DeviceMesh:
    """Of four ranks: two nodes of two where rows go by nodes."""
    if "etp" in WAYS[way]:
        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "etp"))
    if {"dispatcher", "promise"} & set(WAYS[way]):
        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    return init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))


def two_layers(way: str, mesh: DeviceMesh, experts: tuple[int, int] = (EXPERTS, EXPERTS)) -> nn.ModuleDict:
    """The layers "vision" and "text"."""
    options = {"dispatcher": "flat"} | WAYS[way]
    capacity, promise, _ = (options.pop(name, None) for name in ("capacity", "promise", "etp"))
    torch.manual_seed(0)
    layers = zip(("vision", "text"), experts, strict=True)
    model = nn.ModuleDict({name: MoE(WIDTH, 8, number, capacity=capacity, balance=0) for name, number in layers})
    parallelize(model, mesh, **options)
    for layer in model.values():
        if promise is FlatDispatcher:
            layer.dispatcher = FlatDispatcher(dist.group.WORLD, equal_tokens="check")
        elif promise is HierarchicalDispatcher:
            layer.dispatcher = HierarchicalDispatcher.of(mesh, equal_tokens="check")
    return model


def tokens(number: int = 5) -> torch.Tensor:
    return torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))


def raised(fault, *args) -> str:
    with pytest.raises(DispatchError) as error:
        fault(*args)
    return str(error.value)


def faults(way: str) -> list[str]:
    """One after the other among the same ranks: each is noticed before any row travels."""
    last = dist.get_rank() == 3
    mesh = mesh_for(way)
    model, x = two_layers(way, mesh), tokens()
    said = [raised(lambda: model["text" if last else "vision"](x))]
    model["vision"].place.forwards = model["text"].place.forwards = 7  # in step again
    model.train(not last)
    said.append(raised(lambda: model["vision"](x)))
    model.train()
    model["text"].place.forwards += last
    said.append(raised(lambda: model["text"](x)))
    model["text"].place.forwards -= last
    model["text"](x)  # and the ranks go on
    another = two_layers(way, mesh)
    for layer in another.values():
        layer.dispatcher = model["vision"].dispatcher
    said.append(raised(lambda: (another if last else model)["vision"](x)))
    return said


@EACH
def test_the_first_exchange_that_disagrees_says_so_on_all_ranks(way):
    for other, evaluation, later, model in run(4, faults, way):
        assert "'vision'" in other
        assert "'text'" in other
        if way == "split inside":  # two ranks have met no one themselves
            continue
        assert "'vision', training" in evaluation
        assert "'vision', evaluation" in evaluation
        assert "'text', forward 9" in later
        assert "'text', forward 8" in later
        assert "of another model" in model


def unlike_layers(way: str) -> list[str]:
    """Their messages are of different lengths, which gloo would end the process for."""
    said, mesh = [], mesh_for(way)
    for experts in ((EXPERTS, 32 * EXPERTS), (4, EXPERTS)):
        model = two_layers(way, mesh, experts)
        said.append(raised(lambda model=model: model["text" if dist.get_rank() else "vision"](tokens())))
    return said


@pytest.mark.parametrize("way", ["flat", "2dh", "node", "flat, in chunks", "split inside"])
def test_layers_of_different_sizes(way):
    for said in run(4, unlike_layers, way):
        assert all("'vision'" in error and "'text'" in error for error in said)


def other_chunks() -> None:
    model = two_layers("flat, in chunks", mesh_for("flat"))
    layer = model["text"]
    layer.dispatcher = type(layer.dispatcher)(layer.dispatcher.inner, 2 + (dist.get_rank() == 1))
    layer(tokens())


def other_tokens(way: str) -> None:
    two_layers(way, mesh_for(way))["text"](tokens(5 + 8 * (dist.get_rank() == 1)))


def test_another_number_of_chunks():
    for said in errors(4, other_chunks):
        assert "'text', in 3 chunks" in said
        assert "'text', in 2 chunks" in said


@pytest.mark.parametrize("way", ["promised", "promised, 2dh"])
def test_a_promise_that_is_broken(way):
    for said in errors(4, other_tokens, way):
        assert said.startswith("DispatchError: layer 'text': ranks differ in the capacity")


def compiled(way: str) -> str:
    model = two_layers(way, mesh_for(way))
    layers = {name: torch.compile(layer, backend="eager") for name, layer in model.items()}
    for layer in layers.values():
        layer(tokens())
    return raised(lambda: layers["text" if dist.get_rank() == 2 else "vision"](tokens()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("way", ["flat", "padded"])
def test_compiled(way):
    for said in run(4, compiled, way):
        assert "rank 2 in layer 'text'" in said
        assert "'vision'" in said


def step(way: str, skipped: str) -> None:
    """Two training steps; in the second one, rank 1 leaves something out."""
    torch.manual_seed(0)
    model = two_layers(way, mesh_for(way))
    for group in {group for layer in model.values() for group in layer.dispatcher.groups}:
        group.set_timeout(timedelta(seconds=2))
    whole = mesh_for(way) if way == "flat" else None
    for number in range(2):
        left_out = skipped if number == 1 and dist.get_rank() == 1 else ""
        vision, text = model["vision"](tokens()), model["text"](tokens())
        parts = {"vision": vision.sum(), "text": text.sum()}
        if left_out != "backward":
            sum(part for name, part in parts.items() if name != left_out).backward()
        if whole is not None and left_out != "gradients":
            sync_gradients(model, whole)
    if skipped == "backward" and way != "flat":
        model["vision"](tokens())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["flat", "2dh", "node, in chunks", "compressed", "split inside"])
@pytest.mark.parametrize("skipped", ["vision", "text"])
def test_a_loss_that_leaves_a_layer_out_on_one_rank(way, skipped):
    said = [error for _, error, _ in outcomes(4, step, way, skipped, patience=2)]
    for rank in (0, 2, 3):
        error = str(said[rank])
        assert error.startswith("DispatchError: the exchange of "), (rank, said)
    assert any(f"gradients of rows in layer {skipped!r}, forward 2 (training)" in str(error) for error in said), said


@pytest.mark.slow
@pytest.mark.parametrize("way", ["2dh", "node, in chunks", "split inside"])
def test_a_backward_that_one_rank_leaves_out(way):
    said = [error for _, error, _ in outcomes(4, step, way, "backward", patience=2)]
    assert all(error and error.startswith("DispatchError: the exchange of ") for error in said), said
    assert any("sizes in layer 'vision', forward 3 (training)" in str(error) for error in said), said
    assert any("gradients of rows in layer 'text', forward 2 (training)" in str(error) for error in said), said


@pytest.mark.slow
@pytest.mark.parametrize("skipped", ["backward", "gradients"])
def test_a_rank_that_leaves_out_what_all_do_at_the_end_of_a_step(skipped):
    said = [error for _, error, _ in outcomes(4, step, "flat", skipped, patience=2)]
    for rank in (0, 2, 3):
        assert str(said[rank]).startswith("DispatchError: the exchange of "), said


def without_tokens(way: str) -> None:
    """A rank whose batch has nothing for a layer calls it with no tokens, forward and backward."""
    model = two_layers(way, mesh_for(way))
    ours = tokens() if dist.get_rank() != 1 else tokens()[:0]
    y = model["vision"](ours)
    assert y.shape == ours.shape
    (y.square().sum() + model["text"](tokens()).square().sum()).backward()
    mine = {name: p.grad.full_tensor() for name, p in model.named_parameters() if "experts" in name}

    torch.manual_seed(0)
    alone = nn.ModuleDict({name: MoE(WIDTH, 8, EXPERTS, balance=0) for name in ("vision", "text")})
    for rank in range(4):
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(rank))
        (alone["vision"](x if rank != 1 else x[:0]).square().sum() + alone["text"](x).square().sum()).backward()
    for name, p in alone.named_parameters():
        if "experts" in name:
            close(mine[name], p.grad, 1e-5)


@pytest.mark.parametrize("way", ["flat", "2dh", "node", "flat, in chunks", "split inside"])
def test_to_take_part_without_tokens(way):
    run(4, without_tokens, way)
