"""Experts split inside over the axis "etp": many ranks compute what one computes, and all of them hear of errors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, crowd, perceptron, tokens, whole
from ranks import errors, run
from test_layer_parallel import compare, one_rank
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from turnout.dispatch import DispatchError, LocalDispatcher, OverlapDispatcher, TensorParallelDispatcher
from turnout.moe import Balance, Capacity, MoE, aux_loss, clip_grad_norm_, fully_shard_experts, parallelize

pytestmark = pytest.mark.sampled

MESHES = [((1, 2), ("ep", "etp")), ((2, 2), ("ep", "etp")), ((1, 4), ("ep", "etp")), ((2, 1, 2), ("edp", "ep", "etp"))]
BY_NODE = ((2, 1, 2), ("node", "local", "etp"))


def build(**options) -> nn.Module:
    """Hidden narrower and wider than the model: the gate's weight multiplies one or the other."""
    torch.manual_seed(0)
    options = {"balance": Balance(over="global"), "bias": True, **options}
    narrow = MoE(WIDTH, 12, EXPERTS, top_k=3, shared=1, **options)
    wide = MoE(WIDTH, 24, EXPERTS, experts="gelu", **options)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), narrow, nn.Linear(WIDTH, WIDTH), wide).double()


def every_case(shape, names, dispatcher="auto", degree=None):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)

    def spread(model):
        for layer in parallelize(model, mesh, dispatcher):
            if isinstance(layer, MoE):
                assert isinstance(layer.dispatcher, TensorParallelDispatcher)
                if degree:
                    layer.dispatcher = OverlapDispatcher(layer.dispatcher, degree)
        return model

    for sizes in ([6, 3], [0, 5]) if mesh.size() == 2 else ([5, 0, 9, 3], [4, 4, 4, 4]):
        x = tokens(sum(sizes))
        for options in ({}, {"capacity": Capacity(float(EXPERTS), pad=True)}):
            compare(spread(build(**options)), mesh, x, sizes, one_rank(x, build(**options)))
        one, many = build(), build()
        crowd(one)
        crowd(many)
        compare(spread(many), mesh, x, sizes, one_rank(x, one))


@pytest.mark.parametrize(("shape", "names"), [*MESHES, BY_NODE], ids=str)
def test_experts_split_inside_equal_whole_ones(shape, names):
    run(torch.Size(shape).numel(), every_case, shape, names)


@pytest.mark.parametrize(("dispatcher", "degree"), [("2dh", None), ("node", None), ("node", 3)])
def test_on_every_transport(dispatcher, degree):
    run(4, every_case, *BY_NODE, dispatcher, degree)


def norm_of(shape, names):
    mesh, x = init_device_mesh("cpu", shape, mesh_dim_names=names), tokens(8)
    model = parallelize(build(), mesh)
    for layer in model:
        x = layer(x)
    x.square().sum().backward()
    return clip_grad_norm_(model, 1e9).item()


def test_each_slice_counts_once_in_the_norm():
    norms = run(4, norm_of, (2, 2), ("ep", "etp"))
    ranks = 4  # all have the same tokens, and expert gradients are sums over them
    x, model = tokens(8), build()
    for layer in model:
        x = layer(x)
    x.square().sum().backward()
    squares = sum((p.grad.norm() * (ranks if "experts" in n else 1)) ** 2 for n, p in model.named_parameters())
    assert norms == pytest.approx([squares.sqrt().item()] * ranks, rel=1e-9)


def with_fsdp():
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("edp", "ep", "etp"))
    x, sizes = tokens(16), [5, 0, 8, 3]
    _, _, expected, _ = one_rank(x, nn.Sequential(*build(), nn.Softplus()))
    options = {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float64)}
    model = nn.Sequential(*parallelize(build(), mesh), nn.Softplus())
    model = fully_shard_experts(model, mesh, **options)
    fully_shard(model, mesh=mesh["edp", "ep", "etp"]._flatten("all"), **options)
    y = model(x.split(sizes)[dist.get_rank()])
    (y.square().sum() * 4 / 16 + aux_loss(model)).backward()
    return {n: (whole(p.grad) - expected[n]).abs().max().item() for n, p in model.named_parameters()}


def test_under_fsdp():
    for differences in run(4, with_fsdp):
        assert max(differences.values()) < 1e-12, differences


def one_each() -> None:
    """A slice of one expert is laid out without gaps, which FSDP2 asks for."""
    mesh = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("edp", "ep", "etp"))
    model = parallelize(nn.Sequential(MoE(WIDTH, 12, 1, top_k=1, experts="gelu")), mesh)
    assert all(p.is_contiguous() for p in model.parameters())
    fully_shard_experts(model, mesh)


def test_one_expert_a_rank_under_fsdp():
    run(2, one_each)


def one_refuses(which: int, degree: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "etp"))
    layer = parallelize(nn.Sequential(MoE(WIDTH, 12, EXPERTS)), mesh)[0]
    layer.dispatcher = OverlapDispatcher(layer.dispatcher, degree)
    layer(torch.zeros(3, WIDTH + (dist.get_rank() == which)))


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("which", range(4))
def test_all_ranks_hear_of_one_that_fails(which, degree):
    for rank, error in enumerate(errors(4, one_refuses, which, degree)):
        assert ("ValueError" if rank == which else DispatchError.__name__) in error


def one_differs() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "etp"))
    layer = parallelize(nn.Sequential(MoE(WIDTH, 12, EXPERTS)), mesh)[0].to(torch.bfloat16)
    with torch.set_grad_enabled(dist.get_rank() % 2 == 0):
        layer(torch.zeros(3, WIDTH, dtype=torch.bfloat16))


def test_slices_must_agree():
    for error in errors(4, one_differs):
        assert "ranks differ in whether a backward will follow" in error


def refused(experts, hidden, names) -> None:
    mesh = init_device_mesh("cpu", (1, 2)[-len(names) :], mesh_dim_names=names)
    parallelize(nn.Sequential(MoE(WIDTH, hidden, EXPERTS, experts=experts)), mesh)


@pytest.mark.parametrize(
    ("experts", "hidden", "names", "message"),
    [
        (perceptron, 12, ("ep", "etp"), "ModuleExperts cannot be split inside an expert: use a mesh with etp=1"),
        ("gelu", 13, ("ep", "etp"), "does not split over etp=2 on axis"),
        ("gelu", 12, ("etp",), 'give the mesh an axis "ep", too'),
    ],
)
def test_what_cannot_be_split_is_refused(experts, hidden, names, message):
    for error in errors(2, refused, experts, hidden, names):
        assert message in error


def test_the_inner_dispatcher_must_say_its_sizes():
    with pytest.raises(TypeError, match="must be a SteppedDispatcher"):
        TensorParallelDispatcher(LocalDispatcher(), None)  # pyright: ignore[reportArgumentType]
