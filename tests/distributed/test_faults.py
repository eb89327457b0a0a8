"""What one rank does wrong, every rank hears of: an error on each, in words that say what to do, and no hang."""

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, build, tokens
from ranks import errors, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import DispatchError, OverlapDispatcher
from turnout.moe import Balance, Capacity, MoE, parallelize, sync_gradients


def layer(dispatcher: str, **options) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleList([MoE(WIDTH, 12, EXPERTS, **options)])
    name, _, chunks = dispatcher.partition(", ")
    (moe,) = parallelize(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local")), name)
    if chunks:
        moe.dispatcher = OverlapDispatcher(moe.dispatcher, int(chunks))
    return moe


def wrong_width(dispatcher):
    moe = layer(dispatcher)
    moe(tokens(3, torch.float32)[:, : WIDTH - (dist.get_rank() == 2)])


def not_a_number(dispatcher):
    x = tokens(3, torch.float32)
    if dist.get_rank() == 1:
        x[0, 0] = float("nan")
    layer(dispatcher)(x)


def not_a_number_last(dispatcher):
    x = tokens(3, torch.float32)
    if dist.get_rank() == 1:
        x[-1, 0] = float("nan")
    layer(dispatcher)(x)


def not_a_number_padded(dispatcher):
    x = tokens(3, torch.float32)
    if dist.get_rank() == 1:
        x[0, 0] = float("nan")
    layer(dispatcher, capacity=Capacity(2.0, pad=True))(x)


def other_dtype(dispatcher):
    x = tokens(3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dist.get_rank() == 3):
        layer(dispatcher)(x)


def no_backward(dispatcher):
    with torch.set_grad_enabled(dist.get_rank() != 0):
        layer(dispatcher)(tokens(3, torch.float32))


def padded_and_ragged(dispatcher):
    moe = layer(dispatcher, capacity=2.0)
    moe.capacity = Capacity(2.0, pad=dist.get_rank() < 2)
    moe(tokens(3, torch.float32))


def other_seed():
    moe = nn.ModuleList([MoE(WIDTH, 12, EXPERTS, seed=dist.get_rank())])
    parallelize(moe, init_device_mesh("cpu", (4,), mesh_dim_names=("ep",)))


def other_width():
    moe = nn.ModuleList([MoE(WIDTH, 12 + 2 * (dist.get_rank() == 3), EXPERTS, seed=0)])
    parallelize(moe, init_device_mesh("cpu", (4,), mesh_dim_names=("ep",)))


def other_options():
    balance = Balance(over="local" if dist.get_rank() == 3 else "global")
    moe = nn.ModuleList([MoE(WIDTH, 12, EXPERTS, seed=0, balance=balance)])
    parallelize(moe, init_device_mesh("cpu", (4,), mesh_dim_names=("ep",)))


def other_router():
    torch.manual_seed(dist.get_rank())
    moe = nn.ModuleList([MoE(WIDTH, 12, EXPERTS, seed=0)])
    parallelize(moe, init_device_mesh("cpu", (4,), mesh_dim_names=("ep",)))


def one_axis_unknown():
    parallelize(build(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep")))


def synchronised_over_half():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
    sync_gradients(parallelize(build(), mesh), mesh["ep"])


def not_parallelized():
    sync_gradients(build(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep")))


def odd_experts():
    moe = nn.ModuleList([MoE(WIDTH, 12, 6, seed=0)])
    parallelize(moe, init_device_mesh("cpu", (4,), mesh_dim_names=("ep",)))


def twice():
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    parallelize(parallelize(build(), mesh), mesh)


def unknown_axes():
    parallelize(build(), init_device_mesh("cpu", (4,), mesh_dim_names=("tp",)))


def unknown_dispatcher():
    parallelize(build(), init_device_mesh("cpu", (4,), mesh_dim_names=("ep",)), dispatcher="teleport")


def no_nodes():
    parallelize(build(), init_device_mesh("cpu", (4,), mesh_dim_names=("ep",)), dispatcher="node")


def missing_axis():
    from turnout.moe import fully_shard_experts

    fully_shard_experts(build(), init_device_mesh("cpu", (4,), mesh_dim_names=("ep",)))


def divided_twice():
    from turnout.moe import fully_shard_experts

    mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("edp", "ep"))
    fully_shard_experts(parallelize(build(torch.float64), mesh), mesh)


TRANSPORTS = pytest.mark.parametrize("dispatcher", ["flat", "2dh", "node", "flat, 3", "2dh, 2", "node, 4"])


FAULTS = {
    not_a_number: "rank 1 of the expert group: NaN",
    not_a_number_last: "rank 1 of the expert group: NaN",
    not_a_number_padded: "rank 1 of the expert group: NaN",
    other_dtype: "ranks differ in the dtype",
    no_backward: "ranks differ in whether a backward will follow: [0, 1, 1, 1]",
    padded_and_ragged: "some ranks send padded rows and some ragged ones: capacities [",
}


def heard(dispatcher):
    """What each fault raises, one after the other among the same ranks: none leaves an exchange half done."""
    said = []
    for fault in FAULTS:
        with pytest.raises(DispatchError) as raised:
            fault(dispatcher)
        said.append(str(raised.value))
    return said


@TRANSPORTS
def test_every_rank_hears_of_it(dispatcher):
    said, *others = run(4, heard, dispatcher)
    assert others == [said] * 3
    for error, message in zip(said, FAULTS.values(), strict=True):
        assert error.startswith(f"layer '0': {message}")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (other_seed, "MoE layers differ between ranks: the values of parameter experts.w_up of layer 0 on ranks 1, 2"),
        (other_width, "MoE layers differ between ranks: experts of layer 0 is FeedForwardExperts("),
        (other_options, "MoE layers differ between ranks: balance of layer 0 is Balance("),
        (other_router, "MoE layers differ between ranks: the values of parameter gate.weight of layer 0 on ranks 1, 2"),
        (one_axis_unknown, "the mesh has axes ('dp', 'ep'), and nothing would be exchanged along dp"),
        (synchronised_over_half, "the mesh averages over ranks ["),
        (not_parallelized, "layer 1 is on one rank: call parallelize(model, mesh) on all ranks"),
        (odd_experts, "num_experts=6"),
        (twice, "the experts of layer 1 are spread already"),
        (unknown_axes, "the mesh needs axes named"),
        (unknown_dispatcher, "dispatcher must be one of"),
        (no_nodes, 'a hierarchical exchange needs a mesh with axes "node" and "local"'),
        (divided_twice, "with edp=1, FSDP2 divides torch.float64 gradients twice"),
        (missing_axis, "fully_shard_experts needs a mesh with axes edp"),
    ],
)
def test_every_rank_raises(fault, message):
    for error in errors(4, fault):
        assert error.startswith(f"ValueError: {message}"), error


@TRANSPORTS
def test_a_rank_that_raises_alone_takes_the_others_with_it(dispatcher):
    found = errors(4, wrong_width, dispatcher)
    assert found[2].startswith(f"ValueError: x must be (..., {WIDTH})")
    for rank in (0, 1, 3):
        assert found[rank].startswith("DispatchError: layer '0': rank 2 of the expert group raised an error")
