"""Ranks that hold other layers are told apart; those that were built otherwise and hold the same are not."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH
from ranks import errors, run
from test_parallelize import layer, spread_over
from torch import nn
from turnout.moe import MoE, parallelize
from turnout.moe.adapters import add_lora
from turnout.moe.parallel.alike import checksum


def other_seed(gate):
    """Built under other seeds, given the same weights: taken, and drawn alike from then on."""
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(MoE(WIDTH, 12, EXPERTS, gate=gate, seed=7 + dist.get_rank()))
    add_lora(model, 2)
    same = nn.Sequential(layer(3, gate=gate)).float()
    add_lora(same, 2)
    model.load_state_dict({k: v for k, v in same.state_dict().items() if "experts.b_" not in k})
    parallelize(model, spread_over(2))
    assert model[0].experts.seed == 7
    seeds = [None] * 2
    dist.all_gather_object(seeds, [m.seed for m in model.modules() if hasattr(m, "seed")])
    assert seeds[0] == seeds[1]


@pytest.mark.parametrize("gate", ["topk", "sigmoid"])
def test_equal_weights_under_other_seeds(gate):
    run(2, other_seed, gate)


def differs(what):
    """One number on one of three ranks."""
    gate = "hash" if what == "seed of the hash" else "sigmoid"
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), layer(gate=gate, shared=1))
    if dist.get_rank() == 1:
        moe = model[1]
        with torch.no_grad():
            if what == "bias":
                moe.gate.expert_bias[0] = 1.0
            elif what == "expert":
                moe.experts.w_up[3, 0, 0] += 1e-12
            elif what == "order":
                w = moe.experts.w_down
                w[[0, 1]] = w[[1, 0]]
            elif what == "shared":
                moe.shared.up.weight.neg_()
            elif what == "rate":
                moe.gate.rate = 0.5
            elif what == "precision":
                moe.experts.precision = "fp8"
            elif what == "activation":
                moe.experts.activation = "gelu"
            else:
                moe.gate.seed = 1
    parallelize(model, spread_over(3, "edp"))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("bias", "the values of buffer gate.expert_bias of layer 1 on rank 1 differ from ranks 0, 2"),
        ("expert", "the values of parameter experts.w_up of layer 1 on rank 1 differ from ranks 0, 2"),
        ("order", "the values of parameter experts.w_down of layer 1 on rank 1 differ from ranks 0, 2"),
        ("shared", "the values of parameter shared.up.weight of layer 1 on rank 1 differ from ranks 0, 2"),
        ("rate", "rate=0.5"),
        ("activation", "activation='gelu'"),
        ("precision", "experts.precision of layer 1 is None on ranks 0, 2, 'fp8' on rank 1"),
        ("seed of the hash", "seed=1"),
    ],
)
def test_layers_that_differ_are_told_apart(what, message):
    found = errors(3, differs, what)
    for error in found:
        assert error == found[0]
        assert message in error
        assert bool(error) == bool(message)


def on_meta(seed):
    with torch.device("meta"):
        model = nn.Sequential(MoE(WIDTH, 12, EXPERTS, seed=seed + dist.get_rank() * (seed > 0)))
    parallelize(model, spread_over(2))


def test_seeds_must_agree_where_there_are_no_weights_yet():
    assert errors(2, on_meta, 0) == ["", ""]
    for error in errors(2, on_meta, 1):
        assert "the seed of the experts of layer 0 is 1 on rank 0, 2 on rank 1" in error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_a_checksum_knows_values_and_their_order(dtype):
    x = torch.randn(700, 3).mul(9).to(dtype)
    seen = {checksum(x), checksum(x.flip(0)), checksum(x[:-1])}
    assert len(seen) == 3
    assert checksum(x.clone()) in seen
    if dtype.is_floating_point:
        assert checksum(-x) not in seen
        assert checksum(x, chunk=100) != checksum(torch.cat([x[100:200], x[:100], x[200:]]), chunk=100)
