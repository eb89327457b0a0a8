"""Parameter groups: which parameters decay."""

from __future__ import annotations

import pytest
from torch import nn
from turnout.models import GPT, GPTConfig, muon_groups
from turnout.moe import MoE, param_groups


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.norm = nn.LayerNorm(8)
        self.layer = MoE(8, 6, 4, bias=True, shared=1)
        self.own = MoE(8, 6, 4, experts=lambda: nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 8)))


def decays(groups: list[dict], model: nn.Module) -> dict[str, float]:
    by_parameter = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(by_parameter) == len(list(model.parameters()))
    return {name: by_parameter[p] for name, p in model.named_parameters()}


@pytest.mark.parametrize("embeddings", [True, False])
def test_matrices_decay(embeddings):
    model = Model()
    found = decays(param_groups(model, weight_decay=0.1, decay_embeddings=embeddings), model)
    without = {name for name, decay in found.items() if decay == 0}
    assert without == {
        *(["norm.weight", "norm.bias"] if embeddings else ["norm.weight", "norm.bias", "embed.weight"]),
        *(f"layer.experts.b_{name}" for name in ("up", "gate", "down")),
        *(f"layer.shared.{name}.bias" for name in ("up", "gate", "down")),
        *("own.experts.module.0.bias", "own.experts.module.1.weight", "own.experts.module.1.bias"),
        "own.experts.module.2.bias",
    }
    assert {decay for name, decay in found.items() if name not in without} == {0.1}


def test_what_is_given_decays():
    model = Model()
    assert set(decays(param_groups(model.parameters(), weight_decay=0.1), model).values()) == {0.1}
    assert [group.keys() for group in param_groups(model, lr=1.0)] == [{"params", "lr"}]


def test_muon_takes_hidden_matrices():
    model = GPT(
        GPTConfig(dim=8, heads=2, layers=2, hidden=4, num_experts=4, qk_norm=True, tied=False, moe={"shared": 1})
    )
    groups = muon_groups(model, weight_decay=0.1)
    by_parameter = {p: (group["muon"], group["weight_decay"]) for group in groups for p in group["params"]}
    found = {name: by_parameter[p] for name, p in model.named_parameters()}
    assert {name for name, kind in found.items() if kind == (False, 0.1)} == {
        "embed.weight",
        "head.weight",
        "blocks.1.feed_forward.gate.weight",  # the router
    }
    assert {name for name, kind in found.items() if kind == (False, 0.0)} == {n for n in found if "norm" in n}
    assert all(kind == (True, 0.1) for name, kind in found.items() if "attention.q" in name and "norm" not in name)
    assert found["blocks.0.feed_forward.gate.weight"] == found["blocks.1.feed_forward.experts.w_up"] == (True, 0.1)
