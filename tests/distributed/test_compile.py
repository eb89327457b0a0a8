"""torch.compile with experts on two ranks: what is in a graph, what is not, and the results of the layer as it is."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from ranks import outcomes
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import FlatDispatcher, HierarchicalDispatcher, Meshes
from turnout.dispatch.traced import KEEPS_BACKWARDS
from turnout.models import GPT, GPTConfig
from turnout.models.data_parallel import data_parallel
from turnout.moe import Balance, Capacity, MoE, aux_loss, parallelize

pytestmark = [  # of torch's own doing: it makes an instance of what it traces, and looks for gradients everywhere
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

RANKS, WIDTH = 2, 16
PADDED = {"capacity": Capacity(1.25, pad=True)}
WIRED = 1 if KEEPS_BACKWARDS else 3
# axes; arguments of the layer; of parallelize; graphs of a forward: a trip outside has one before it, one after it
# and, where experts are not interleaved with it, one of theirs
CASES: dict[str, tuple[tuple[str, ...], dict, dict, int]] = {
    "padded, equal tokens": (("ep",), PADDED, {"dispatcher": "equal"}, 1),
    "padded, 2dh, fp8": (("node", "local"), PADDED, {"dispatcher": "equal", "wire": "fp8"}, WIRED),
    "ragged, node": (("node", "local"), {}, {"dispatcher": "node"}, 3),
    "ragged": (("ep",), {}, {"dispatcher": "flat"}, 3),
    "auto": (("node", "local"), {}, {"dispatcher": "auto", "overlap": 1}, 2),
    "overlapped": (("ep",), {}, {"dispatcher": "flat", "overlap": 2}, 2),
}


def on_ranks(fn, *args) -> list:
    """`run` with patience: one rank may compile long after the other has."""
    results = outcomes(RANKS, fn, *args, timeout=500, patience=400)
    assert not any(error for _, error, _ in results), "\n".join(trace for *_, trace in results)
    return [value for value, *_ in results]


def build(axes: tuple[str, ...], options: dict, how: dict) -> MoE:
    torch.manual_seed(0)
    layer = MoE(WIDTH, 32, 8, 2, balance=Balance(over="global"), **options)
    mesh = init_device_mesh("cpu", (1, RANKS) if len(axes) > 1 else (RANKS,), mesh_dim_names=axes)
    if how["dispatcher"] == "equal":
        kind = HierarchicalDispatcher.of(mesh, equal_tokens=True) if len(axes) > 1 else None
        how = {**how, "dispatcher": kind or FlatDispatcher(mesh.get_group(), equal_tokens=True)}
    return parallelize(layer, mesh, **how)


def step(layer: nn.Module, forward, x: Tensor) -> list[Tensor]:
    """Output, loss of balance, gradients of x and of what this rank holds."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = forward(x)
    balance = aux_loss(layer)
    (y.square().mean() + balance).backward()
    grads = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in layer.parameters()]
    return [y.detach(), balance.detach(), x.grad, *grads]


def compiled_steps(axes, options, how, fullgraph: bool) -> int:
    rank, layer = dist.get_rank(), build(axes, options, how)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=fullgraph)
    time.sleep(rank)  # ranks do not compile at the same time
    for number in range(3):
        x = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(10 * number + rank))
        with torch.no_grad():  # loads change, and how many rows a rank receives
            layer.gate.weight.normal_(generator=torch.Generator().manual_seed(number))
        for ours, same in zip(step(layer, compiled, x), step(layer, layer, x), strict=True):
            torch.testing.assert_close(ours, same)
    return counter.frame_count


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_as_it_is_and_compiled_once(case):
    *made_of, graphs = case
    assert on_ranks(compiled_steps, *made_of, graphs == 1) == [graphs] * RANKS


def one_rank_is_given_nonsense(axes, options, how) -> str:
    layer = build(axes, options, how)
    compiled = torch.compile(layer, backend="eager")
    compiled(torch.randn(24, WIDTH))
    try:
        compiled(torch.randn(24, WIDTH + dist.get_rank()))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_an_error_on_one_rank_reaches_the_other():
    axes, options, how, *_ = CASES["ragged"]
    waiting, failed = on_ranks(one_rank_is_given_nonsense, axes, options, how)
    assert f"(..., {WIDTH})" in failed
    assert "rank 1 of the expert group raised an error" in waiting


def sharded_blocks(compiled: bool) -> list[Tensor]:
    """Loss and gradients of a model under FSDP2, whose hooks break graphs; its blocks are compiled one by one."""
    torch.manual_seed(0)
    meshes = Meshes.of("cpu", ep=RANKS)
    model = GPT(GPTConfig(vocab=32, dim=WIDTH, layers=1, heads=2, hidden=12, seq_len=8, num_experts=4, moe_every=1))
    parallelize(model, meshes)
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks if compiled else ():
        block.compile(backend=counter)
    data_parallel(model, meshes, "fsdp")
    ids = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(2):
        model.zero_grad()
        loss = model(ids).square().mean() + aux_loss(model)
        loss.backward()
    assert (counter.frame_count > 0) == compiled
    return [loss.detach(), *(p.grad.to_local() for p in model.parameters())]


def both_ways() -> None:
    for ours, same in zip(sharded_blocks(True), sharded_blocks(False), strict=True):
        torch.testing.assert_close(ours, same)


@pytest.mark.slow
def test_blocks_compiled_one_by_one_under_fsdp():
    on_ranks(both_ways)
