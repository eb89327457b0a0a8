"""Forced balance: tokens go to the experts in turn, to measure the speed of a step without the router's imbalance."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from turnout.models import ParallelModel
from turnout.moe import Gate, Routing
from turnout.moe.layer import moe_layers


class InTurn:
    """Hook of an MoE layer: token t visits experts t k to t k + k - 1, modulo E. The router weighs them."""

    ended = False  # no recording or replay may replace it

    def __call__(self, gate: Gate, tokens: Tensor, routing: Routing) -> Routing:
        places = torch.arange(len(tokens) * gate.top_k, device=tokens.device).view(-1, gate.top_k)
        expert = places % routing.num_experts
        sent = replace(routing, expert=expert, weight=gate.weigh(routing, expert))
        return sent if routing.mask is None else sent.masked(routing.mask)


def force_balance(model: ParallelModel) -> None:
    """Send the tokens of all MoE layers to the experts in turn. The model then learns badly."""
    for layer in moe_layers(model).values():
        layer.tap = InTurn()
