"""What travels where experts come to their tokens, who must agree, and what it works with."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, close, tokens, whole
from ranks import run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from turnout.dispatch import DispatchError, OverlapDispatcher
from turnout.moe import (
    Capacity,
    MoE,
    load,
    parallelize,
    param_groups,
)

SLICED = ((2, 2), ("ep", "etp"))


def mesh_of(shape=(2,), names=("ep",)):
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def layer_on(mesh, experts=EXPERTS, kind="swiglu", **options) -> MoE:
    layer = MoE(WIDTH, 24, experts, experts=kind, top_k=min(2, experts), balance=0.0, seed=0, **options).double()
    with torch.no_grad():
        layer.gate.weight.copy_(tokens(experts))
    return parallelize(nn.ModuleList([layer]), mesh)[0]


def shard(number: int = 17, sizes=(5, 0, 9, 3)) -> Tensor:
    sizes = sizes if dist.get_world_size() == 4 else (9, 8)
    return tokens(number).split(sizes)[dist.get_rank()].clone().requires_grad_()


def outcome(layer: nn.Module, x: Tensor | None = None) -> list[Tensor]:
    """Output, x gradient, and each parameter's, of one step."""
    layer.zero_grad()
    x = shard() if x is None else x.detach().requires_grad_()
    y = layer(x)
    (y * torch.arange(1, 1 + WIDTH)).sum().backward()
    return [y.detach(), x.grad, *(whole(p.grad) for p in layer.parameters() if p.requires_grad)]


def alike(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(found, expected, strict=True):
        close(a, b, tolerance)


@contextmanager
def counting():
    """Bytes that this rank gets from others meanwhile: by all-to-all, and by messages."""
    got, rank = [0], dist.get_rank
    exchange, receive = dist.all_to_all_single, dist.irecv

    def counted(out, x, recv=None, send=None, group=None, **options):
        rows = [len(out) // dist.get_world_size(group)] * dist.get_world_size(group) if recv is None else recv
        row = out[:1].numel() * out.element_size() if len(out) else 0
        if out.is_floating_point():  # sizes and notes are counted apart
            got[0] += (sum(rows) - rows[rank(group)]) * row
        return exchange(out, x, recv, send, group=group, **options)

    def received(out, **options):
        got[0] += out.numel() * out.element_size()
        return receive(out, **options)

    dist.all_to_all_single, dist.irecv = counted, received
    try:
        yield got
    finally:
        dist.all_to_all_single, dist.irecv = exchange, receive


def bytes_of_steps() -> None:
    """Of W ranks and s slices, r = 0 gathers P (W - 1) / W, others P / E / r (1 - r / s) for each expert held."""
    for shape, names, experts in [((4,), ("ep",), EXPERTS), (*SLICED, 2), ((1, 4), ("ep", "etp"), 1)]:
        layer = layer_on(mesh_of(shape, names), experts)
        slices = shape[-1] if names[-1] == "etp" else 1
        optimizer = torch.optim.AdamW(param_groups(layer))
        P, none = 8 * sum(p.numel() for p in layer.experts.parameters()), shard()[:0]
        for r in [r for r in range(slices + 1) if r == 0 or slices % r == 0] * 2:
            with counting() as before:
                layer.parallelism = r
            with counting() as forward:  # no rank has tokens, so that weights alone travel
                y = layer(none)
            with counting() as backward:
                y.sum().backward()
            with counting() as step:
                optimizer.step()
            expected = P * 3 / 4 if r == 0 else P / shape[0] / r * (1 - r / slices)
            assert [before[0], forward[0], backward[0], step[0]] == [0, expected, expected, 0]


def test_what_is_gathered_is_what_theory_says_and_a_switch_moves_nothing():
    run(4, bytes_of_steps)


def bytes_of_shadows() -> None:
    """P / E for each shadowed expert of others; their tokens stay."""
    layer = layer_on(mesh_of((4,)))
    one = 8 * sum(p.numel() for p in layer.experts.parameters()) // EXPERTS
    for ids in [(0, 2, 5, 7), tuple(range(EXPERTS)), (0, 1, 5), (5,), ()]:
        layer.shadow = ids
        mine = len(set(ids) & set(layer.experts.owned))
        with counting() as forward:
            y = layer(shard()[:0])
        with counting() as backward:
            y.sum().backward()
        in_pieces = len(ids) in (1, 3)  # one rank has 1 of 1, or 2 of 3: it sends them once
        others = len(ids) - mine
        expected = [others + 3 / 4 * mine, 3 / 4 * len(ids) + 3 / 4 * mine] if in_pieces else [others, 3 * mine]
        assert [forward[0], backward[0]] == [one * share for share in expected]
    layer.shadow = range(EXPERTS)
    with counting() as rows:
        layer(shard())
    assert rows[0] == one * (EXPERTS - len(layer.experts.owned))


def test_shadowed_experts_are_sent_by_their_owners_alone():
    run(4, bytes_of_shadows)


CHOICES = [{"parallelism": 0}, {"parallelism": 1}, {"parallelism": 1, "shadow": (1, 2)}, {"shadow": (0,)}]


def choose(layer: MoE, parallelism=None, shadow=None) -> None:
    if parallelism is not None:
        layer.parallelism = parallelism
    layer.shadow = shadow


def identical(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Recomputed(nn.Module):
    """Activations are computed again in the backward, so weights are gathered again."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


def of_one_layer() -> None:
    mesh = mesh_of(*SLICED)
    layer = layer_on(mesh, capacity=Capacity(0.75, drop="position"), bias=True)
    expected = outcome(layer)
    assert float(load(layer, mesh)[""].dropped) > 0
    before = {name: whole(t) for name, t in layer.state_dict().items()}
    for choice in CHOICES:
        choose(layer, **choice)
        found = outcome(layer)
        alike(found, expected)  # the same assignments are dropped
        assert identical(found, outcome(layer))  # sums have a fixed order
        layer.experts.recompute = True
        assert identical(found, outcome(layer))
        layer.experts.recompute = False
        assert identical(found, outcome(Recomputed(layer)))
        copied = copy.deepcopy(layer)
        assert (copied.parallelism, copied.shadow) == (layer.parallelism, layer.shadow)
        with torch.no_grad():
            close(layer(shard()), found[0], 1e-12)
    for name, t in layer.state_dict().items():
        assert torch.equal(whole(t), before[name])


def test_drops_bits_recomputation_and_states_do_not_depend_on_the_choice():
    run(4, of_one_layer)


def on_eight() -> None:
    layer = layer_on(mesh_of((2, 4), ("ep", "etp")), 2)
    x = tokens(24).split([5, 0, 9, 3, 2, 2, 0, 3])[dist.get_rank()]
    expected = outcome(layer, x)
    for r in (2, 1, 0, 4):
        layer.parallelism = r
        alike(outcome(layer, x), expected)


def test_two_experts_on_eight_ranks():
    run(8, on_eight)


OTHERWISE = [  # what all ranks choose but one, and that one
    ({"parallelism": 1}, {"parallelism": 0}),
    ({"parallelism": 0}, {"parallelism": 1}),
    ({"shadow": (1,)}, {"shadow": (2,)}),
    ({}, {"shadow": (4,)}),
]


def disagreements() -> list[str]:
    """Whatever one rank chooses otherwise, or if it fails, all raise, and the next forward works."""
    said, rank = [], dist.get_rank()
    for shape, names in [((4,), ("ep",)), SLICED, ((2, 2), ("node", "local"))]:
        layer = layer_on(mesh_of(shape, names))
        for dispatcher in (layer.dispatcher, OverlapDispatcher(layer.dispatcher, 2)):
            layer.dispatcher = dispatcher
            for most, one in OTHERWISE:
                choose(layer, parallelism=1)
                choose(layer, **(one if rank == 2 else most))
                with pytest.raises(DispatchError) as caught:
                    layer(shard())
                said.append(str(caught.value))
            for choice in ({"parallelism": 0}, {"parallelism": 1, "shadow": (0,)}):
                choose(layer, **choice)
                with pytest.raises(ValueError if rank == 1 else DispatchError):
                    layer(torch.zeros(3, WIDTH + (rank == 1)).double())  # heard before the gather
                layer(shard())
    return said


def test_ranks_that_choose_otherwise_are_told():
    told = [text for each in run(4, disagreements) for text in each]
    assert any("parallelism 1; " in text and "rank 2 in" in text for text in told)
    assert any("Set layer.shadow to the same experts on all ranks" in text for text in told)
    assert all(" parallelism " in t or "shadow" in t or "see its own message" in t or "met a rank" in t for t in told)
