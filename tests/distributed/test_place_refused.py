"""Placements that are refused, on every rank, and what goes on with one: adapters and compiled layers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, build, tokens, whole
from ranks import run
from test_placed_states import BACKWARDS, MIXED, everything, mesh_of, same
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from turnout.models import GPT, GPTConfig
from turnout.moe import MoE, aux_loss, check, parallelize, param_groups, place_experts, sync_gradients
from turnout.moe.adapters import add_lora
from turnout.moe.experts.placed import Placement
from turnout.moe.upcycling import upcycle


def refused() -> list[str]:
    mesh, rank, said = mesh_of((2,)), dist.get_rank(), []
    model, optimizer = trained_on_two(mesh)
    before = everything(model, optimizer)
    alone = torch.optim.SGD(model[0].parameters(), lr=1.0)
    odd = torch.optim.SGD(model.parameters(), lr=1.0)
    odd.state[model[1].experts.w_up]["table"] = torch.ones(3)
    listed = torch.optim.SGD(model.parameters(), lr=1.0)
    listed.state[model[1].experts.w_up]["table"] = [1]
    home = list(range(EXPERTS))
    for given, orders in [
        (optimizer, {"2": home}),
        (optimizer, {"1": [*home[:-1], 0]}),
        (optimizer, {"1": BACKWARDS if rank else home}),
        (optimizer, {"1": home[1:] if rank else home}),
        (alone, {"1": BACKWARDS}),
        (None, {"1": BACKWARDS}),  # there are gradients
        (odd, {"1": BACKWARDS}),
        (listed, {"1": BACKWARDS}),
        (optimizer if rank else odd, {"1": BACKWARDS}),
    ]:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            place_experts(model, mesh, given, orders)
        said.append(str(caught.value))
        assert model[1].experts.placement is None
    same(everything(model, optimizer), before)
    with pytest.raises(ValueError, match="call parallelize"):
        place_experts(build(), mesh, None, {"1": BACKWARDS})

    y = model(tokens(6))
    place_experts(model, mesh, optimizer, {"1": BACKWARDS})
    with pytest.raises(RuntimeError, match=r"modified.*inplace"):
        (y.sum() + aux_loss(model)).backward()
    later = torch.optim.SGD(model.parameters(), lr=1.0)
    check(model, mesh, optimizer)
    with pytest.raises(ValueError, match="the optimizer was made after place_experts"):
        check(model, mesh, later)
    place_experts(model, mesh, later, {})
    check(model, mesh, later)
    return said


def trained_on_two(mesh):
    model = parallelize(build(), mesh)
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    (model(tokens(6)).square().sum() + aux_loss(model)).backward()
    sync_gradients(model, mesh)
    optimizer.step()
    return model, optimizer


def test_what_cannot_be_placed_is_refused_on_every_rank_before_anything_moves():
    for rank, said in enumerate(run(2, refused)):
        for text, words in zip(
            said,
            [
                "orders has '2', which is no MoE layer of the model: its layers are '1', '3'",
                "the order of layer '1' must have each of the experts 0 to 7 once",
                "place_experts: the order of layer '1' is ",
                "the order of layer '1' must have each of the experts" if rank else "rank 1: the order of layer '1'",
                "no optimizer has w_up of layer '1': pass all optimizers",
                "no optimizer has w_up of layer '1': pass all optimizers",
                "table, which the optimizer keeps for w_up of layer '1', is a Tensor [3]",
                "the optimizer keeps table for w_up of layer '1', a list",
                "rank 0: table, which the optimizer keeps" if rank else "table, which the optimizer keeps",
            ],
            strict=True,
        ):
            assert words in text.replace("layer 1", "layer '1'"), text


def adapted_and_compiled() -> None:
    """LoRA's matrices move with their experts; a compiled layer is compiled once for all placements."""
    mesh = mesh_of((2,))
    model = parallelize(nn.Sequential(MoE(WIDTH, 12, EXPERTS, balance=0.0, seed=0)).double(), mesh)
    add_lora(model, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    x, draw = tokens(9), partial(torch.randperm, EXPERTS, generator=torch.Generator().manual_seed(0))
    optimizer, expected = torch.optim.AdamW(param_groups(p for p in model.parameters() if p.requires_grad)), model(x)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model[0], backend=counter)
    graphs = []
    for _ in range(3):
        torch.testing.assert_close(compiled(x), expected)
        place_experts(model, mesh, optimizer, {"0": draw().tolist()})
        torch.testing.assert_close(model(x), expected)
        graphs.append(counter.frame_count)
    assert graphs[1] > graphs[0]  # ids are mapped to slots from now on
    assert graphs[1] == graphs[2]

    model[0].experts.reset_parameters()  # by expert, wherever it lies
    twin = add_lora(nn.Sequential(MoE(WIDTH, 12, EXPERTS, balance=0.0, seed=0)).double(), 2).state_dict()
    for name, t in model.state_dict().items():
        assert "experts" not in name or torch.equal(whole(t), twin[name]), name


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of torch's own doing
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_adapters_move_and_a_placement_compiles_once():
    run(2, adapted_and_compiled)


def test_what_reads_experts_in_the_order_of_their_slots_is_refused():
    pytest.importorskip("transformers")
    from turnout.models.hf import gpt_format as hf
    from turnout.models.hf import restore_moe
    from turnout.models.hf.slots import family_slots

    model = add_lora(nn.Sequential(MoE(WIDTH, 12, EXPERTS)), 2)
    gpt = GPT(GPTConfig(dim=8, layers=1, heads=2, hidden=4, num_experts=EXPERTS, moe_every=1, seq_len=4))
    for experts in (model[0].experts, gpt.blocks[0].feed_forward.experts):
        vars(experts)["_placement"] = Placement(tuple(MIXED), None)
    readers = [
        lambda: add_lora(model, 2, name="second"),
        lambda: upcycle(model, model),
        lambda: hf.to_hf(gpt, "nowhere"),
        lambda: hf.load_hf(gpt, "nowhere"),
        lambda: restore_moe(model),
        lambda: family_slots(model),
    ]
    for read in readers:
        with pytest.raises(ValueError, match="another order than that of their ids"):
            read()
