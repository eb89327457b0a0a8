"""The model of a case of fuzz.py, on one rank."""

from __future__ import annotations

from typing import Any

import torch
from fuzz import WIDTH, Case, Layer
from reference_layer import Settings
from torch import Tensor, nn
from turnout.moe import Balance, Capacity, MoE, Residual
from turnout.moe.adapters import add_lora, lora_parameters
from turnout.moe.gates import GATES

LORA = {"rank": 2, "alpha": 3.0}
RATE = 0.05


class Model(nn.Module):
    """Mixtures of experts behind a dense perceptron, which tensor parallelism can split; each with a way around it."""

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(WIDTH, 8, bias=False), nn.Tanh(), nn.Linear(8, WIDTH, bias=False))
        self.layers = nn.ModuleList(moe(layer) for layer in layers)

    def forward(self, x: Tensor, mask: Tensor | None, ids: Tensor | None) -> Tensor:
        x = (x + self.first(x)).contiguous()  # noise is drawn in the order of memory
        for layer in self.layers:
            x = x + layer(x, mask, ids)
        return x


def moe(layer: Layer) -> MoE:
    """The layer, and its gate by name where there are no options."""
    s = layer.settings
    gate = GATES[s.gate](WIDTH, s.choices, s.top_k, **s.options) if s.options else s.gate
    shared = nn.Linear(WIDTH, WIDTH) if layer.shared == "linear" else layer.shared
    made = MoE(
        WIDTH,
        layer.hidden,
        s.num_experts,
        s.top_k,
        gate,
        s.experts,
        capacity=capacity(s, layer.pad),
        balance=Balance(s.aux_loss_weight, s.balance, s.balance_choices, s.z_loss_weight),
        shared=Residual(shared) if s.residual else shared,
        free=s.free_experts,
        bias=layer.bias,
    )
    made.experts.weight_on, made.experts.recompute = s.weight_on, layer.recompute
    return made


def capacity(s: Settings, pad: bool = False) -> Capacity | None:
    """The capacity rule that the oracle's settings spell out."""
    if s.capacity_factor is None and s.eval_capacity_factor is None:
        return None
    return Capacity(s.capacity_factor, s.eval_capacity_factor, s.min_capacity, s.drop_policy, pad)


@torch.no_grad()
def build(case: Case, seed: int = 0) -> Model:
    """The model on one rank, its routers far from even, adapters far from zero."""
    torch.manual_seed(case.seed + seed)
    model = Model(case.layers).to(case.dtype)
    for layer in model.layers:
        assert isinstance(layer, MoE)
        for name, p in [*layer.gate.named_parameters(), *layer.gate.named_buffers()]:
            if p.dtype != torch.int64 and name != "temperature":
                p.copy_(torch.randn_like(p) * 0.5)
    if case.adapters == "early":
        adapt(case, model)
        for p in lora_parameters(model).values():
            p.copy_(torch.randn_like(p) * 0.3)
    return model


def adapt(case: Case, model: Model) -> None:
    """Adapters; the dense part is trained as well."""
    add_lora(model, router=case.router, **LORA)
    model.first.requires_grad_(True)


def optimizer(case: Case, parameters: Any) -> torch.optim.Optimizer:
    if case.wire:  # after a step by rounded gradients others would be chosen
        return torch.optim.SGD(parameters, lr=0.0)
    if case.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=0.3, momentum=0.9, weight_decay=0.1)
    return torch.optim.AdamW(parameters, lr=RATE, eps=1e-3)  # an eps far above rounding
