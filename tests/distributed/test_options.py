"""`parallelize(..., overlap=, wire=)`: the same dispatchers as those put together by hand, and errors for nonsense."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, tokens, whole
from ranks import errors, run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import (
    AutoDispatcher,
    CompressedDispatcher,
    Dispatcher,
    FlatDispatcher,
    HierarchicalDispatcher,
    LocalDispatcher,
    NodeDispatcher,
    OverlapDispatcher,
    Profile,
    TensorParallelDispatcher,
)
from turnout.dispatch.autoselect.profile import Choice, Flop, Link
from turnout.moe import MoE, parallelize

NODE = Profile(2, 2, Link(0.0, 0.0, 0.0), Link(0.0, 0.0, 1.0), Flop(1.0))  # the model takes "node", in 4 chunks


def by_node():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))


def layer(mesh, dispatcher: str | Dispatcher = "auto", **options) -> MoE:
    (moe,) = parallelize(nn.ModuleList([MoE(WIDTH, 12, EXPERTS, top_k=3, seed=0)]), mesh, dispatcher, **options)
    with torch.no_grad():
        moe.gate.weight.copy_(tokens(EXPERTS))
    return moe


def outcome(moe: MoE) -> list[Tensor]:
    x = tokens(17, torch.float32).split([5, 0, 9, 3])[dist.get_rank()].clone().requires_grad_()
    y = moe(x)
    (y * torch.arange(WIDTH)).sum().backward()
    return [y.detach(), x.grad, *(whole(p.grad) for p in moe.parameters() if p.grad is not None)]


def by_hand(mesh, dispatcher: str, overlap, wire) -> Dispatcher:
    made: Dispatcher = {
        "flat": lambda: FlatDispatcher(mesh._flatten("ep").get_group()),
        "2dh": lambda: HierarchicalDispatcher.of(mesh),
        "node": lambda: NodeDispatcher.of(mesh),
    }[dispatcher]()
    made = CompressedDispatcher(made, wire) if wire else made
    return OverlapDispatcher(made, overlap) if overlap else made


def named(dispatcher: str, overlap, wire) -> None:
    mesh = by_node()
    expected = by_hand(mesh, dispatcher, overlap, wire)
    found = layer(mesh, dispatcher, overlap=overlap, wire=wire)
    assert found.dispatcher == expected
    instance = layer(mesh, by_hand(mesh, dispatcher, None, None), overlap=overlap, wire=wire)
    assert instance.dispatcher == expected
    plain = layer(mesh, expected)
    assert plain.dispatcher is expected
    for a, b, c in zip(outcome(found), outcome(plain), outcome(instance), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("dispatcher", ["flat", "2dh", "node"])
@pytest.mark.parametrize(("overlap", "wire"), [(None, None), (3, None), (None, "fp8"), (2, "bf16"), ("auto", "fp8")])
def test_options_are_what_one_would_put_together(dispatcher, overlap, wire):
    run(4, named, dispatcher, overlap, wire)


def auto(overlap, wire, degree: int) -> list:
    mesh = by_node()
    found = layer(mesh, profile=NODE, overlap=overlap, wire=wire)
    expected = layer(mesh, by_hand(mesh, "node", degree, wire))
    assert all(torch.equal(a, b) for a, b in zip(outcome(found), outcome(expected), strict=True))
    chooser = found.dispatcher.inner if isinstance(found.dispatcher, OverlapDispatcher) else found.dispatcher
    assert isinstance(chooser, AutoDispatcher)
    given = AutoDispatcher.of(mesh, NODE)
    instance = layer(mesh, given, overlap=overlap, wire=wire).dispatcher
    assert instance == found.dispatcher
    return [chooser.chosen, type(found.dispatcher).__name__]


@pytest.mark.parametrize("wire", [None, "bf16", "fp8"])
@pytest.mark.parametrize(("overlap", "degree"), [(None, 4), (3, 3), ("auto", 1)])
def test_auto_knows_of_them(overlap, wire, degree):
    kind = "OverlapDispatcher" if overlap == "auto" else "AutoDispatcher"  # tries in steps, or goes by costs
    assert run(4, auto, overlap, wire, degree) == [[("node", degree), kind]] * 4


def message_of(wire) -> int:
    """Bytes of a row that the model counts on."""
    seen, choose = [], Profile.choose
    Profile.choose = lambda self, message, degrees: seen.append(message.row_bytes) or choose(self, message, degrees)
    layer(by_node(), profile=NODE, wire=wire)(tokens(3, torch.float32))
    (found,) = seen
    return found


def test_the_model_counts_the_bytes_on_the_wire():
    assert run(4, message_of, None) == [4 * WIDTH] * 4
    assert run(4, message_of, "bf16") == [2 * WIDTH] * 4
    assert run(4, message_of, "fp8") == [(WIDTH + 4 + 2 * WIDTH) // 2] * 4


def split_inside(overlap) -> Choice | None:
    """Where experts are split as well, chunks are those asked for: the model does not know that travel."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("node", "local", "etp"))
    found = layer(mesh, profile=replace(NODE, locals=1), overlap=overlap)
    for a, b in zip(outcome(found), outcome(layer(mesh, "flat")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    sliced = found.dispatcher.inner if overlap else found.dispatcher
    assert isinstance(sliced, TensorParallelDispatcher)
    return sliced.inner.chosen


@pytest.mark.parametrize("overlap", [None, 2])
def test_with_experts_split_inside(overlap):
    assert run(4, split_inside, overlap) == [("flat", 1)] * 4


def alone() -> list[str]:
    """Nothing travels, so there is nothing to compress; the options stay valid where a job is tried on one rank."""
    one, many = (init_device_mesh("cpu", shape, mesh_dim_names=("edp", "ep")) for shape in ((4, 1), (1, 4)))
    return [type(layer(mesh, overlap=2, wire="fp8").dispatcher).__name__ for mesh in (one, many)]


def test_on_one_rank_they_have_no_effect():
    assert run(4, alone) == [["LocalDispatcher", "OverlapDispatcher"]] * 4


def wrong(options: dict, wrap: str | None) -> None:
    flat = FlatDispatcher(dist.group.WORLD)
    made = {"overlap": OverlapDispatcher(flat, 2), "wire": CompressedDispatcher(flat), "local": LocalDispatcher()}
    layer(by_node(), made[wrap] if wrap else "flat", **options)


@pytest.mark.parametrize(
    ("options", "wrap", "message"),
    [
        ({"overlap": 0}, None, 'ValueError: overlap must be None, "auto" or a positive integer; got 0'),
        ({"overlap": True}, None, 'ValueError: overlap must be None, "auto" or a positive integer; got True'),
        ({"overlap": "two"}, None, "ValueError: overlap must be"),
        ({"wire": "fp4"}, None, "ValueError: wire must be None or one of bf16, fp8; got 'fp4'"),
        ({"overlap": 2}, "overlap", "ValueError: overlap=2, but the dispatcher overlaps already"),
        ({"wire": "fp8"}, "wire", "ValueError: wire='fp8', but the dispatcher compresses already"),
        ({"wire": "fp8"}, "overlap", "TypeError: inner must be a SteppedDispatcher"),
        ({"wire": "fp8"}, "local", "TypeError: inner must be a SteppedDispatcher"),
    ],
)
def test_what_does_not_fit_is_named(options, wrap, message):
    for found in errors(4, wrong, options, wrap):
        assert found.startswith(message)


def unlike() -> None:
    layer(by_node(), "flat", overlap=2 + dist.get_rank() // 3, wire="bf16")


def test_ranks_that_differ():
    for found in errors(4, unlike):
        assert found.startswith("ValueError: MoE layers differ between ranks: ")
        assert "overlap is 2 on ranks 0, 1, 2, 3 on rank 3" in found
