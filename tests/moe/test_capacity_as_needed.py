"""Capacity that follows the load: the smallest padding that drops nothing, the same on all ranks."""

import pytest
import torch
from ranks import errors, run
from reference import close
from routed import drawn
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import FlatDispatcher, HierarchicalDispatcher, NodeDispatcher, OverlapDispatcher
from turnout.moe import Capacity, MoE, parallelize

D, H, E, K = 6, 5, 4, 2


def layer(capacity, seed=0, **options):
    torch.manual_seed(seed)
    return MoE(D, H, E, K, capacity=capacity, balance=0, seed=seed, **options).double()


def twins(capacity, other):
    first, second = layer(capacity), layer(other)
    second.load_state_dict(first.state_dict())
    return first, second


def rows(model, x, mask=None):
    """Rows that the experts got in a forward, and what it returned."""
    seen = []
    hook = model.experts.register_forward_pre_hook(lambda _, args: seen.append(args[-1].tolist()))
    y = model(x, mask)
    hook.remove()
    return seen[0], y


@pytest.mark.parametrize("tokens", [0, 1, 7, 40])
@pytest.mark.parametrize("training", [True, False])
def test_every_expert_is_padded_to_the_largest_load_and_nothing_is_dropped(tokens, training):
    needed, dropless = (each.train(training) for each in twins("as needed", None))
    x, other = (drawn(tokens, D).requires_grad_() for _ in range(2))
    counts, y = rows(needed, x)
    wanted = dropless(other)
    assert close(y, wanted, 1e-12)
    assert counts == [int(dropless.stats.tokens_per_expert.max())] * E
    assert needed.stats.dropped == 0
    if tokens:
        y.square().sum().backward()
        wanted.square().sum().backward()
        assert close(x.grad, other.grad, 1e-12)


def test_up_to_a_limit_then_it_drops():
    x = drawn(40, D)
    first, dropless = twins(Capacity("as needed", at_most=3.0), None)
    dropless(x)
    load = int(dropless.stats.tokens_per_expert.max())
    assert rows(first, x)[0] == [load] * E
    first.capacity = Capacity("as needed", at_most=0.5, drop="position")
    fixed = layer(Capacity(0.5, drop="position", pad=True))
    fixed.load_state_dict(first.state_dict())
    counts, y = rows(first, x)
    assert counts == [10] * E  # 0.5 * 2 * 40 / 4
    assert torch.equal(y, fixed(x))
    assert 0 < first.stats.dropped == fixed.stats.dropped


def test_padding_tokens_need_no_rows():
    first, dropless = twins("as needed", None)
    x, mask = drawn(12, D), torch.arange(12) < 2
    dropless(x, mask)
    assert rows(first, x, mask)[0] == [int(dropless.stats.tokens_per_expert.max())] * E


def test_eval_and_training_each_have_a_rule():
    model, x = layer(Capacity(1.0, eval_factor="as needed", pad=True)), drawn(40, D)
    assert rows(model, x)[0] == [20] * E
    assert rows(model.eval(), x)[0] == [int(model.stats.tokens_per_expert.max())] * E
    model.capacity = "as needed"
    assert model.capacity == Capacity("as needed", eval_factor="as needed")
    assert rows(model.train(), x)[0] == [int(model.stats.tokens_per_expert.max())] * E
    model.capacity = Capacity("as needed", at_most=9.0)
    model.capacity = 2.0
    assert rows(model, x)[0] == [40] * E


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Capacity("as need"), TypeError, "factor must be a positive number or 'as needed'; got 'as need'"),
        (lambda: Capacity(1.0, at_most=2.0), ValueError, "at_most=2.0 is the limit of 'as needed': set"),
        (lambda: Capacity("as needed", at_most=0), ValueError, "at_most must be a positive number"),
        (lambda: layer("most"), TypeError, "capacity must be a positive number or 'as needed'; got 'most'"),
    ],
)
def test_what_does_not_fit(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, after a graph break
def test_compiled_once_for_equal_loads():
    model, other = twins("as needed", None)
    built = []
    compiled = torch.compile(model, backend=lambda graph, _: built.append(graph) or graph.forward)
    for seed in (0, 0, 1, 2, 3, 3):
        x = drawn(20, D, seed=seed)
        assert close(compiled(x), other(x), 1e-12)
    graphs = len(built)
    for seed in (4, 5, 6):
        compiled(drawn(20, D, seed=seed))
    assert len(built) == graphs
    torch.compiler.reset()  # or later tests begin with a layer whose graph is broken


SIZES = [5, 0, 9, 3]


def over_ranks(kind, capacity, wanted):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    flat = FlatDispatcher(torch.distributed.group.WORLD, equal_tokens="check")
    made = {
        "flat": flat,
        "2dh": HierarchicalDispatcher.of(mesh),
        "node": NodeDispatcher.of(mesh),
        "overlap": OverlapDispatcher(flat, 2),
    }[kind]
    model = parallelize(layer(capacity), mesh, made)
    rank = torch.distributed.get_rank()
    x = drawn(sum(SIZES), D).split(SIZES)[rank].clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert close(y, wanted[0].split(SIZES)[rank], 1e-12)
    assert close(x.grad, wanted[1].split(SIZES)[rank], 1e-12)


@pytest.mark.parametrize("kind", ["flat", "2dh", "node", "overlap"])
def test_ranks_with_other_loads_agree(kind):
    x = drawn(sum(SIZES), D).requires_grad_()
    y = layer(None)(x)
    y.square().sum().backward()
    run(4, over_ranks, kind, "as needed", (y.detach(), x.grad))


def promised():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    flat = FlatDispatcher(mesh.get_group(), equal_tokens=True)
    parallelize(layer("as needed"), mesh, flat)(drawn(4, D, seed=torch.distributed.get_rank()))


def test_without_an_exchange_to_agree_in_it_is_refused():
    for error in errors(2, promised):
        assert 'Capacity("as needed") differs between ranks' in error
