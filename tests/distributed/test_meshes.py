"""Beyond the plain case: groups side by side, replicas alone, recomputation, branches, ranks with nothing to do."""

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, build, close, crowd, tokens, whole
from ranks import run
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from turnout.moe import Balance, Capacity, aux_loss, clip_grad_norm_, parallelize, sync_gradients

SHARDS = [5, 0, 9, 3]


def backward(model, x, total, ranks=1, forward=None):
    """The gradients of the mean over tokens: that of x, and the norm of all others, which stay on the parameters."""
    x = x.clone().requires_grad_()
    y = model(x) if forward is None else forward(model, x)
    (y.square().sum() * ranks / total + aux_loss(model)).backward()
    return y.detach(), x.grad / ranks


def compare(model, one):
    for (name, p), q in zip(model.named_parameters(), one.parameters(), strict=True):
        close(whole(p.grad), q.grad, 1e-12, name)
    close(clip_grad_norm_(model, 0.1), clip_grad_norm_(one, 0.1), 1e-12, "norm")
    for (name, p), q in zip(model.named_parameters(), one.parameters(), strict=True):
        close(whole(p.grad), q.grad, 1e-12, f"clipped {name}")


def stages(given):
    """Two expert groups with a batch each, as pipeline stages have: neither hears the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "ep"))
    stage, rank = divmod(dist.get_rank(), 2)
    sizes = [[7, 5], [0, 6]][stage]
    x, one = (stage + 1) * tokens(sum(sizes)), build()
    y1, grad1 = backward(one, x, len(x))
    model = parallelize(build(), mesh if given == "root" else mesh["ep"])
    y, grad = backward(model, x.split(sizes)[rank], len(x), ranks=2)
    sync_gradients(model, mesh if given == "root" else mesh["ep"])
    close(y, y1.split(sizes)[rank], 1e-12)
    close(grad, grad1.split(sizes)[rank], 1e-12)
    compare(model, one)
    return float(y.square().sum())


@pytest.mark.parametrize("given", ["root", "part"])
def test_two_groups_beside_each_other(given):
    found = run(4, stages, given)
    assert found[0] != found[2] == 0.0  # the stages computed different things, and a rank had nothing


def axes(shape, names):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    x, one = tokens(sum(SHARDS)), build()
    y1, grad1 = backward(one, x, len(x))
    model = parallelize(build(), mesh)
    y, grad = backward(model, x.split(SHARDS)[dist.get_rank()], len(x), ranks=4)
    sync_gradients(model, mesh)
    close(y, y1.split(SHARDS)[dist.get_rank()], 1e-12)
    close(grad, grad1.split(SHARDS)[dist.get_rank()], 1e-12)
    compare(model, one)
    return [type(model[i].dispatcher).__name__ for i in (1, 3)]


@pytest.mark.parametrize(
    ("shape", "names", "dispatcher"),
    [
        ((4,), ("ep",), "FlatDispatcher"),
        ((4,), ("edp",), "LocalDispatcher"),
        ((4, 1), ("edp", "ep"), "LocalDispatcher"),
        ((2, 1, 2), ("edp", "node", "local"), "AutoDispatcher"),
        ((1, 2, 2), ("edp", "node", "local"), "AutoDispatcher"),
    ],
    ids=str,
)
def test_axes(shape, names, dispatcher):
    assert run(4, axes, shape, names) == [[dispatcher] * 2] * 4


def recomputed(options):
    """Activation checkpointing: the same bits, and losses counted once, whether one region or several."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
    mine, found = tokens(sum(SHARDS)).split(SHARDS)[dist.get_rank()], []

    def whole_model(model, x):
        return checkpoint(model, x, use_reentrant=False)

    def each_layer(model, x):
        for layer in model:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    for forward in (None, whole_model, each_layer, each_layer):
        model = parallelize(build(**options), mesh)
        y, grad = backward(model, mine, 17, 4, forward)
        sync_gradients(model, mesh)
        found.append([y, grad, aux_loss(model).detach(), *(whole(p.grad) for p in model.parameters())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert found[0][2] > 1e-2 or not len(mine)


@pytest.mark.parametrize(
    "options", [{}, {"capacity": Capacity(1.0, pad=True)}, {"balance": Balance(over="local", z_loss=1e-2)}], ids=str
)
def test_recomputation(options):
    run(4, recomputed, options)


def branches():
    """Two layers side by side: on every rank their exchanges, and those of their backward, come in one order."""
    mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("edp", "ep"))

    def both(model, x):
        return model[1](x) + 2 * model[3](x) + model[1](x.flip(1))

    x, one = tokens(sum(SHARDS)), build()
    model = parallelize(build(), mesh)
    y1, grad1 = backward(one, x, len(x), forward=both)
    y, grad = backward(model, x.split(SHARDS)[dist.get_rank()], len(x), ranks=4, forward=both)
    sync_gradients(model, mesh)
    close(y, y1.split(SHARDS)[dist.get_rank()], 1e-12)
    close(grad, grad1.split(SHARDS)[dist.get_rank()], 1e-12)
    for i in (1, 3):
        for (name, p), q in zip(model[i].named_parameters(), one[i].parameters(), strict=True):
            close(whole(p.grad), q.grad, 1e-12, name)


def test_layers_side_by_side():
    run(4, branches)


def nothing(options, masked):
    """No rank has a token that counts: zeros come back, gradients are zeros and present, and nobody waits."""
    mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("edp", "ep"))
    model = parallelize(build(**options), mesh)
    x = tokens(3 if masked else 0).requires_grad_()
    moe = model[1]
    moe.shared = None
    y = moe(x, torch.zeros(3, dtype=torch.bool)) if masked else moe(x)
    (y.square().sum() + aux_loss(moe)).backward()
    sync_gradients(moe, mesh)
    assert not y.any()
    assert clip_grad_norm_(moe, 1.0) == 0
    for name, p in moe.named_parameters():
        assert p.grad is not None, name
        assert not whole(p.grad).any(), name
    assert moe.stats.tokens_per_expert.tolist() == [0] * EXPERTS


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"capacity": 1.0}, {"capacity": Capacity(1.0, pad=True)}], ids=str)
def test_nothing_to_do(options, masked):
    run(4, nothing, options, masked)


def overrun():
    """All tokens want the same experts, which lie on one rank: each source is held to its own limit."""
    mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("edp", "ep"))
    model = parallelize(build(capacity=Capacity(1.0, drop="position")), mesh)
    crowd(model)
    mine = tokens(sum(SHARDS)).split(SHARDS)[dist.get_rank()]
    model[1](mine)
    stats, T = model[1].stats, len(mine)
    limit = -(-3 * T // EXPERTS)  # top_k 3, factor 1
    assert sorted(stats.tokens_per_expert.tolist()) == [0] * (EXPERTS - 3) + [T] * 3
    expected = (T - limit) / T if T else 0.0
    assert abs(float(stats.dropped) - expected) < 1e-6


def test_capacity_is_a_rule_for_each_source():
    run(4, overrun)
