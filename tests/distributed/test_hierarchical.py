"""2DH gives the bits of the flat exchange, gradients included, and sends fewer messages between nodes."""

import itertools
import re

import pytest
import torch
import torch.distributed as dist
from cases import build, tokens, whole
from ranks import run
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from turnout.dispatch import FlatDispatcher, HierarchicalDispatcher, Plan, all_to_all, all_to_all_2d
from turnout.dispatch.plan import load
from turnout.moe import Capacity, aux_loss, parallelize, sync_gradients

WIDTH, OWNED = 5, 2  # experts a rank owns
SHAPES = [(2, 2), (1, 4), (4, 1), (2, 1), (1, 2), (1, 1), (3, 2)]
SIZES = [5, 0, 9, 3, 1, 6]  # tokens of each rank
SEEN = ("rows", "weight", "counts", "y", "x.grad", "weight.grad", "experts.grad")


def mesh_of(shape, names=("node", "local")):
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def same(a: Tensor, b: Tensor) -> bool:
    """Every bit: 0.0 is not -0.0."""
    bits = [t.contiguous().view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def chosen(kind: str, k: int, ranks: int, g: torch.Generator) -> Tensor:
    """expert [T, k] of this rank, for a kind of load."""
    number = 0 if kind == "nothing" else SIZES[dist.get_rank()]
    order = torch.rand(number, OWNED * ranks, generator=g).argsort(1)
    if kind == "crowd":  # the first k experts get all there is; with k = 1, one gets it
        order = torch.arange(OWNED * ranks).expand(number, -1)
    elif kind == "odd":  # every second expert stays empty
        order = torch.where(order % 2 == 0, -1, order)
    return order[:, :k].contiguous()


class Experts:
    """Experts that are not linear, with a parameter whose gradient depends on the order of the rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(dist.get_rank())
        self.weight = torch.randn(OWNED, WIDTH, WIDTH, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    def __call__(self, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        blocks = rows[: int(counts.sum())].split(counts.tolist())
        done = torch.cat([(block @ w).tanh() for block, w in zip(blocks, self.weight, strict=True)])
        return done * weight[: len(done)].unsqueeze(1)


def trip(dispatcher, x, plan, weight, toward):
    """What a rank can see of a trip: the experts' batch, the outputs, and the gradients of all that has one."""
    x, weight, experts = x.clone().requires_grad_(), weight.clone().requires_grad_(), Experts(x.dtype)
    batch = dispatcher.dispatch(x, plan, weight)
    y = dispatcher.combine(experts(batch.rows, batch.weight, batch.counts), batch.receipt)
    y.backward(toward)
    return [*(t.detach() for t in batch[:3]), y.detach(), x.grad, weight.grad, experts.weight.grad]


def same_bits(shape):
    mesh, ranks = mesh_of(shape), shape[0] * shape[1]
    flat, hierarchical = FlatDispatcher(dist.group.WORLD), HierarchicalDispatcher.of(mesh)
    g = torch.Generator().manual_seed(100 + dist.get_rank())
    signal, dtypes = 0, itertools.cycle([torch.float32, torch.bfloat16, torch.float64])
    for kind, k, pad in itertools.product(("any", "crowd", "odd", "nothing"), (1, 2, 3, 4), (False, True)):
        if k > OWNED * ranks:
            continue
        dtype = next(dtypes)
        expert = chosen(kind, k, ranks, g)
        weight = torch.where(expert < 0, 0.0, torch.rand(expert.shape, generator=g)).to(dtype)
        x, toward = torch.randn(2, len(expert), WIDTH, generator=g).to(dtype)
        room = int(load(expert, OWNED * ranks).max()) + dist.get_rank()  # ranks disagree: the largest counts
        plan = Plan.of(expert, OWNED * ranks, room if pad else None)
        one, other = (trip(dispatcher, x, plan, weight, toward) for dispatcher in (flat, hierarchical))
        for what, a, b in zip(SEEN, one, other, strict=True):
            assert same(a, b), (kind, k, pad, dtype, what)
        signal += int(one[4].count_nonzero())
    return signal


@pytest.mark.sampled
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_is_that_of_the_flat_exchange(shape):
    signal = run(shape[0] * shape[1], same_bits, shape)
    assert all((number > 100) == (size > 0) for number, size in zip(signal, SIZES, strict=False))


def model_bits(shape, names, options):
    """Two layers of a model, on either transport: outputs and all gradients."""
    mesh, found = mesh_of(shape, names), []
    mine = tokens(17).split([5, 0, 9, 3])[dist.get_rank()]
    for dispatcher in ("flat", "2dh"):
        model = parallelize(build(**options), mesh, dispatcher)
        x = mine.clone().requires_grad_()
        y = model(x)
        (y.square().sum() + aux_loss(model)).backward()
        sync_gradients(model, mesh)
        found.append([y.detach(), x.grad, *(whole(p.grad) for p in model.parameters())])
        kinds = {type(model[i].dispatcher).__name__ for i in (1, 3)}
        assert kinds == {"HierarchicalDispatcher" if dispatcher == "2dh" else "FlatDispatcher"}
    assert all(same(a, b) for a, b in zip(*found, strict=True))
    assert all(grad.any() for grad in found[0][2:])


@pytest.mark.sampled
@pytest.mark.parametrize("options", [{}, {"capacity": 1.0}, {"capacity": Capacity(1.0, pad=True)}], ids=str)
@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((2, 2), ("node", "local")),
        ((1, 4), ("node", "local")),
        ((4, 1), ("node", "local")),
        ((2, 1, 2), ("edp", "node", "local")),
        ((2, 2, 1), ("node", "edp", "local")),
    ],
    ids=str,
)
def test_a_model_on_2dh_has_the_bits_of_one_on_flat(shape, names, options):
    run(4, model_bits, shape, names, options)


class Sent:
    """Counts what `all_to_all_single` sends from this rank to ranks of other nodes, call by call."""

    def __init__(self, locals_: int) -> None:
        self.locals, self.calls, self.really = locals_, [], dist.all_to_all_single

    def __call__(self, out, x, recv=None, send=None, group=None, **options):
        peers = dist.get_process_group_ranks(group or dist.group.WORLD)
        send = send or [len(x) // len(peers)] * len(peers)
        away = [rows for peer, rows in zip(peers, send, strict=True) if peer // self.locals != self.node and rows]
        self.calls.append((len(away), sum(away) * x[:1].numel()))
        return self.really(out, x, recv, send, group=group, **options)

    @property
    def node(self) -> int:
        return dist.get_rank() // self.locals


def messages(shape, pad):
    """(messages, numbers) to other nodes in each collective of a trip with 2DH, and of one with flat."""
    mesh, ranks = mesh_of(shape), shape[0] * shape[1]
    x = torch.ones(OWNED * ranks, WIDTH)
    plan = Plan.of(torch.arange(OWNED * ranks).unsqueeze(1), OWNED * ranks, 1 if pad else None)  # one for each expert
    found = []
    for dispatcher in (HierarchicalDispatcher.of(mesh, equal_tokens=pad), FlatDispatcher(dist.group.WORLD, pad)):
        dist.all_to_all_single = sent = Sent(shape[1])  # this process is the test's alone
        batch = dispatcher.dispatch(x, plan, torch.ones(len(x), 1))
        dispatcher.combine(batch.rows, batch.receipt)
        dist.all_to_all_single = sent.really
        found.append([call for call in sent.calls if call[0]])
    return found


@pytest.mark.sampled
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (2, 3), (4, 1), (1, 4)], ids=str)
def test_between_nodes_a_rank_sends_one_message_for_each_node(shape, pad):
    nodes, locals_ = shape
    collectives = 3 if pad else 4  # rows, their weights, the way back; and the sizes
    for hierarchical, flat in run(nodes * locals_, messages, shape, pad):
        assert [number for number, _ in hierarchical] == [nodes - 1] * (collectives if nodes > 1 else 0)
        assert [number for number, _ in flat] == [(nodes - 1) * locals_] * (collectives if nodes > 1 else 0)
        payload = slice(0 if pad else 1, None)  # what crosses is the same, sizes apart
        assert [rows for _, rows in hierarchical[payload]] == [rows for _, rows in flat[payload]]


def plain(shape):
    """`all_to_all_2d` is the flat exchange over the same ranks, and so is its gradient."""
    mesh, ranks, rank = mesh_of(shape), shape[0] * shape[1], dist.get_rank()
    for trailing, rows, dtype in (((3,), 2, torch.float64), ((), 1, torch.bfloat16), ((2, 2), 3, torch.float32)):
        a = (1000 * rank + torch.arange(ranks * rows)).to(dtype).reshape(-1, *[1] * len(trailing)).repeat(1, *trailing)
        b = a.clone().requires_grad_()
        a.requires_grad_()
        (one,), other = all_to_all(a, group=None), all_to_all_2d(b, mesh)
        assert same(one.detach(), other.detach())
        toward = torch.randn(one.shape, generator=torch.Generator().manual_seed(rank)).to(dtype)
        one.backward(toward)
        other.backward(toward)
        assert same(a.grad, b.grad)
    assert all_to_all_2d(torch.zeros(0, 3), mesh).shape == (0, 3)
    x = torch.arange(ranks) + ranks * rank  # one number for each rank
    assert all_to_all_2d(x, mesh).tolist() == [ranks * source + rank for source in range(ranks)]
    wrong = torch.zeros(ranks + 1, 2) if ranks > 1 else torch.zeros(())
    with pytest.raises(ValueError, match=re.escape(f"x must be [{ranks} * r, ...]")):
        all_to_all_2d(wrong, mesh)


@pytest.mark.sampled
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_to_all_2d_is_the_flat_all_to_all(shape):
    run(shape[0] * shape[1], plain, shape)


def unfit_meshes():
    model, needs = build(), 'axes "node" and "local" in place of "ep"'
    for mesh in (
        mesh_of((4,), ("ep",)),
        mesh_of((4,), ("edp",)),
        mesh_of((2, 2), ("local", "node")),
        mesh_of((2, 1, 2), ("ep", "node", "local")),
    ):
        with pytest.raises(ValueError, match=needs):
            all_to_all_2d(torch.zeros(4), mesh)
        with pytest.raises(ValueError, match=needs):
            parallelize(model, mesh, dispatcher="2dh")
    for ranks, names in (([[3, 1], [0, 2]], ("node", "local")), ([[[0, 1]], [[3, 2]]], ("edp", "node", "local"))):
        with pytest.raises(ValueError, match="ranks must ascend along node and local"):
            parallelize(model, DeviceMesh("cpu", ranks, mesh_dim_names=names), dispatcher="2dh")
    parallelize(model, mesh_of((4,), ("ep",)))  # it was left as it was
    alone = parallelize(build(), mesh_of((4, 1, 1), ("edp", "node", "local")), dispatcher="2dh")
    return type(alone[1].dispatcher).__name__


def test_2dh_wants_nodes_and_their_ranks_in_order():
    assert run(4, unfit_meshes) == ["LocalDispatcher"] * 4
