"""A budget of rows: steps above it run in rounds, with the results of one, or drop rows, and hold no more."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, build, close, crowd, tokens, whole
from ranks import errors, run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from turnout.dispatch import BoundedDispatcher, Dispatcher, FlatDispatcher
from turnout.dispatch.bounded import Over
from turnout.moe import Capacity, MoE, fully_shard_experts, load, parallelize

RANKS, UNEVEN, BUDGET = 4, [7, 0, 9, 1], 20
MESHES = {"ep": (4,), "node local": (2, 2), "ep etp": (2, 2), "edp": (4,)}
CASES = {  # mesh, options of the layers, options of parallelize, choices between steps, whether all tokens go one way
    "flat": ("ep", {}, {}, {}, True),
    "flat, any routing": ("ep", {}, {}, {}, False),
    "2dh": ("node local", {}, {"dispatcher": "2dh"}, {}, True),
    "node": ("node local", {}, {"dispatcher": "node"}, {}, True),
    "auto": ("node local", {}, {}, {}, False),
    "chunks": ("node local", {}, {"dispatcher": "node", "overlap": 2}, {}, True),
    "local": ("edp", {}, {}, {}, True),
    "padded": ("ep", {"capacity": Capacity(1.5, pad=True)}, {}, {}, True),
    "padded as needed": ("node local", {"capacity": "as needed"}, {"dispatcher": "node", "overlap": 2}, {}, True),
    "drops": ("node local", {"capacity": Capacity(1.5, drop="position")}, {"dispatcher": "2dh"}, {}, True),
    "etp": ("ep etp", {}, {}, {}, True),
    "r = 1 of 2": ("ep etp", {}, {}, {"parallelism": 1}, True),
    "r = 0": ("ep", {}, {}, {"parallelism": 0}, True),
    "shadow": ("ep", {}, {}, {"shadow": [0]}, True),
    "compressed": ("ep", {}, {"wire": "bf16"}, {}, True),
}


def layers(case: str, max_rows: int | None) -> nn.Module:
    mesh, options, more, choices, crowded = CASES[case]
    model = build(**options)
    if crowded:
        crowd(model)
    if mesh == "ep etp":
        model = model[:3]  # experts of a user's own cannot be split
    shape, names = MESHES[mesh], tuple(mesh.split())
    parallelize(model, init_device_mesh("cpu", shape, mesh_dim_names=names), max_rows=max_rows, **more)
    for layer in model.modules():
        if isinstance(layer, MoE):
            for name, value in choices.items():
                setattr(layer, name, value)
    return model


class Rows:
    """The rows that the experts of each layer got, in forward and backward."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[int] = []
        for layer in model.modules():
            if isinstance(layer, MoE):
                layer.experts.register_forward_pre_hook(lambda _, args: self.seen.append(len(args[1])))


def outcome(model: nn.Module) -> list[Tensor]:
    """y, the gradient of x, and every parameter's."""
    x = tokens(sum(UNEVEN)).split(UNEVEN)[dist.get_rank()].clone().requires_grad_()
    y = model(x)
    (y * torch.arange(WIDTH)).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(whole(torch.zeros_like(p) if p.grad is None else p.grad) for p in model.parameters())]


def compare(case: str) -> int:
    """Returns how often the experts of one layer ran in the forward and the backward of the bounded model."""
    expected = outcome(layers(case, None))
    model = layers(case, BUDGET)
    rows = Rows(model)
    for actual, wanted in zip(outcome(model), expected, strict=True):
        if case != "compressed":
            close(actual, wanted, 1e-11)
        else:  # each round rounds gradients that one round sums before
            assert not wanted.numel() or (actual - wanted).abs().max() <= 0.02 * wanted.abs().max()
    if case != "r = 0":
        assert max(rows.seen) <= BUDGET
    return len(rows.seen)


@pytest.mark.parametrize("case", CASES)
def test_rounds_have_the_results_of_one_round_and_stay_below_the_budget(case):
    ran = run(RANKS, compare, case)
    assert len(set(ran)) == 1 or case == "local"
    assert max(ran) > 4 or case in ("r = 0", "flat, any routing", "auto")


def with_others(what: str) -> None:
    """Two backwards of a layer under FSDP2, or inside a checkpoint."""
    results = []
    for max_rows in (None, BUDGET):
        layer = MoE(WIDTH, 12, EXPERTS, top_k=3, seed=0, balance=0).double()
        crowd(layer)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
        parallelize(layer, mesh, max_rows=max_rows)
        if what == "fsdp2":
            fully_shard_experts(layer, mesh)
        x = tokens(40).split(10)[dist.get_rank()].clone().requires_grad_()
        for _ in range(2):
            y = layer(x) if what == "fsdp2" else checkpoint(layer, x, use_reentrant=False)
            assert isinstance(y, Tensor)
            (y * torch.arange(WIDTH)).sum().backward()
        results.append([x.grad, *(whole(p.grad) for p in layer.experts.parameters() if p.grad is not None)])
    for expected, actual in zip(*results, strict=True):
        close(actual, expected, 1e-11)


@pytest.mark.parametrize("what", ["fsdp2", "checkpoint"])
def test_under_fsdp2_and_in_a_checkpoint(what):
    run(RANKS, with_others, what)


class Live(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if type(tensor) is Tensor:
                storage = tensor.untyped_storage()
                known = self.alive.get(storage._cdata)
                if known is None or known[0].expired():
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: each for key, each in self.alive.items() if not each[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


T, D, H = 1024, 64, 96


def most_bytes(experts: str, max_rows: int | None) -> int:
    """Bytes that one forward and backward of two ranks needs, if all tokens choose the experts of one rank."""
    torch.manual_seed(0)
    layer = MoE(D, H, 4, experts=experts, balance=0)
    crowd(layer)
    parallelize(layer, init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)), max_rows=max_rows)
    x, grad = torch.randn(T, D, requires_grad=True), torch.randn(T, D)
    with Live() as live:
        layer(x).backward(grad)
    return live.most


def bytes_at_most(experts: str, rows: int) -> int:
    """The formula of docs/guides/parallel.md, with the gradients of the experts."""
    matrices = 3 if experts == "swiglu" else 2
    return 4 * (6 * T * D + rows * (5 * D + (2 * matrices - 1) * H) + 2 * matrices * D * H)


@pytest.mark.parametrize("experts", ["swiglu", "gelu"])
def test_memory_stays_below_the_formula(experts):
    arrive = 2 * T * 2  # the rows of both ranks, k = 2
    assert max(run(2, most_bytes, experts, 256)) <= bytes_at_most(experts, 256)
    without = max(run(2, most_bytes, experts, None))
    assert bytes_at_most(experts, 1024) < without <= bytes_at_most(experts, arrive)


def dropped() -> tuple[float, int, list[str]]:
    torch.manual_seed(0)
    layer, mesh = MoE(WIDTH, 12, EXPERTS, top_k=3, seed=0), init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    crowd(layer)
    parallelize(layer, mesh)
    layer.dispatcher, rows = BoundedDispatcher(layer.dispatcher, BUDGET, over="drop"), Rows(layer)
    x = tokens(RANKS * 9, torch.float32).split(9)[dist.get_rank()]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        y = layer(x)
        counted = layer.stats
        layer(x)
        layer.dispatcher = replace(layer.dispatcher, max_rows=BUDGET + 1)
        layer(x)
    whole = load(layer, mesh)[""]
    limit = BUDGET // EXPERTS  # of each rank for each expert
    assert counted.dropped.item() == pytest.approx((counted.tokens_per_expert - limit).clamp(min=0).sum().item() / 27)
    mine = counted.dropped.clone()
    dist.all_reduce(mine)
    assert whole.dropped.item() == pytest.approx(mine.item() / RANKS)  # each forward dropped as many
    layer.dispatcher = replace(layer.dispatcher, max_rows=1000)
    full = layer(x)
    assert layer.stats.dropped == 0
    lost = (y - full).abs().amax(1) > 1e-6
    return lost.float().mean().item(), max(rows.seen[:-1]), [str(each.message) for each in said]


def test_drop_is_said_once_and_counted_and_keeps_the_budget():
    for lost, rows, said in run(RANKS, dropped):
        assert 0 < lost < 1
        assert rows <= BUDGET
        (message,) = said
        for word in ("rank ", " rows in layer ''", f"max_rows={BUDGET}", "raise max_rows"):
            assert word in message


def test_drops_are_counted_beside_those_of_capacity_and_said_after_rounds():
    """Twelve tokens choose experts 0 and 1. Capacity keeps 9 for each, then the budget 16 // 4."""
    layer, x = MoE(WIDTH, 12, 4, top_k=2, capacity=1.5, seed=0, balance=0.0), tokens(12, torch.float32)
    crowd(layer)
    layer.dispatcher = BoundedDispatcher(layer.dispatcher, 16)
    layer(x)  # in rounds
    assert layer.stats.dropped.item() == pytest.approx(6 / 24)
    layer.dispatcher = replace(layer.dispatcher, over="drop")
    with pytest.warns(UserWarning, match="are dropped"):
        layer(x)
    assert layer.stats.dropped.item() == pytest.approx((24 - 8) / 24)
    layer.dispatcher = replace(layer.dispatcher, max_rows=24)  # which one rank holds in any case
    layer(x)
    assert layer.stats.dropped.item() == pytest.approx(6 / 24)
    assert load(layer)[""].dropped.item() == pytest.approx((6 + 16 + 6) / 72)


class Plain(Dispatcher):
    """A user's own, which tells no sizes."""

    def dispatch(self, x, plan, weight):
        return FlatDispatcher(dist.group.WORLD).dispatch(x, plan, weight)

    def combine(self, rows, receipt):
        return FlatDispatcher(dist.group.WORLD).combine(rows, receipt)


def fault(what: str) -> None:
    model = layers("flat", 8 if what == "small" else BUDGET)
    layer, odd = model.get_submodule("1"), dist.get_rank() == 2
    assert isinstance(layer, MoE)
    if what == "plain":
        layer.dispatcher = BoundedDispatcher(Plain(), BUDGET)
    if what == "differs" and odd:
        layer.dispatcher = replace(layer.dispatcher, max_rows=BUDGET + 1)
    if what == "without" and odd:
        layer.dispatcher = layer.dispatcher.inner
    layer(tokens(9)[:, : WIDTH - (what == "width" and odd)])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("without", "DispatchError: ranks of the expert group are in different forwards: ranks 0, 1, 3 in layer '1', "),
        ("differs", "DispatchError: ranks of the expert group are in different forwards: ranks 0, 1, 3 in layer '1', "),
        ("width", "DispatchError: layer '1': rank 2 of the expert group raised an error"),
        ("small", "ValueError: rank 2 would hold 72 rows in layer '1', over max_rows=8, which is too small for 8 blo"),
        ("plain", "TypeError: max_rows needs a dispatcher that tells its sizes before its rows leave; Plain is none"),
    ],
)
def test_every_rank_raises(what, message):
    found = errors(RANKS, functools.partial(fault, what))
    if what == "width":
        assert found.pop(2).startswith("ValueError: x must be")
    for error in found:
        assert error.startswith(message), error


def compiled(over: Over) -> None:
    torch.manual_seed(0)
    layer = MoE(WIDTH, 12, EXPERTS, balance=0).double()
    crowd(layer)
    parallelize(layer, init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)), max_rows=BUDGET)
    layer.dispatcher = replace(layer.dispatcher, over=over)
    x, results = tokens(18), []
    for forward in (layer, torch.compile(layer, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, layer.stats.dropped))
    assert results[0][2] == 0 if over == "rounds" else results[0][2] > 0
    for actual, expected in zip(*results, strict=True):
        close(actual, expected, 1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*are dropped:UserWarning")
@pytest.mark.parametrize("over", get_args(Over))
def test_under_compile_the_result_is_the_same(over):
    run(2, compiled, over)


def test_arguments():
    inner = FlatDispatcher(None)  # pyright: ignore[reportArgumentType]
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="max_rows must be a positive integer"):
            BoundedDispatcher(inner, wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="over must be one of rounds, drop"):
        BoundedDispatcher(inner, 8, "shadow")  # pyright: ignore[reportArgumentType]
