"""How a block of Hugging Face's transformers is taken apart into the `Parts` of a `MoE`.

`plain` reads it off the block, for most families. `FAMILIES` has those whose block does something of its own, by the
name of its class, so that nothing here imports transformers. All others keep their block, and the experts alone are
replaced (`recognise.py`). What each router does is in docs/guides/hugging_face.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .block_experts import (
    DbrxExperts,
    FusedExperts,
    GptOssExperts,
    JetMoeExperts,
    ListedExperts,
    LongcatFlashExperts,
    gather,
)
from .block_gates import DbrxGate, JetMoeGate, Llama4Gate, PhimoeGate, RouterGate, SwitchTransformersGate
from .block_parts import Parts
from .block_twins import score_of

Block = Any  # attributes of transformers' modules are not typed
ROUTERS = ("gate", "router")
SHARED = ("shared_experts", "shared_expert", "shared_mlp")
JITTER = ("jitter_noise", "input_jitter_noise")


class GatedShared(nn.Module):
    """A shared expert times a sigmoid of the token (Qwen2-MoE)."""

    def __init__(self, expert: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.expert, self.gate = expert, gate

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return torch.sigmoid(self.gate(x)) * self.expert(x)


class Bias(nn.Module):
    """What a block adds to every token: its own parameter `bias` [D] (JetMoE)."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.bias, self._block = block.bias, (block,)  # in a tuple: not a submodule

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.bias.expand_as(x)

    def give_back(self) -> None:
        """Let the block have the bias of now; collective where that is spread."""
        gather(self)
        self._block[0].bias = self.bias


def plain(block: Block) -> Parts:
    """Router, stacked experts, and perhaps shared ones, a gate on these, or noise on what enters in training.

    Raises:
        ValueError: the block has something else.
    """
    children = {name: child for name, child in block.named_children() if child is not None}
    own, experts = _only(children, ROUTERS), children.pop("experts", None)
    shared, gate = _only(children, SHARED), children.pop("shared_expert_gate", None)
    if len(inspect.signature(type(block).forward).parameters) != 2:
        raise ValueError(f"{type(block).__name__} is called with more than hidden states")
    if own is None or experts is None or children:
        raise ValueError(f"{type(block).__name__} is not a router, experts and shared experts alone")
    if getattr(own, "weight", None) is None or not hasattr(own, "top_k"):
        raise ValueError(f"{type(own).__name__}, the router, must have `weight` [E, D] and `top_k`")
    if gate is not None and shared is not None:
        shared = GatedShared(shared, gate)
    jitter = max((getattr(block, name, 0.0) or 0.0 for name in JITTER), default=0.0)
    return Parts(RouterGate(own, own.weight, own.top_k, score_of(own)), FusedExperts(experts), shared, jitter)


def phimoe(block: Block) -> Parts:
    """Noise twice in training: here, and in the router, which writes its own to its input."""
    gate = PhimoeGate(block.router, block.router.weight, 2)
    return Parts(gate, FusedExperts(block.experts), jitter=block.input_jitter_noise)


def gpt_oss(block: Block) -> Parts:
    """Interleaved, with biases; a pair is returned."""
    gate = RouterGate(block.router, block.router.weight, block.router.top_k)
    return Parts(gate, GptOssExperts(block.experts), pair=True)


def llama4(block: Block) -> Parts:
    """The weight multiplies what enters an expert; a pair is returned."""
    gate = Llama4Gate(block.router, block.router.weight, block.router.top_k, "sigmoid")
    experts = FusedExperts(block.experts, transposed=True, weight_first=True)
    return Parts(gate, experts, block.shared_expert, pair=True, flat=True)


def dbrx(block: Block) -> Parts:
    """The choice is made in the block."""
    gate = DbrxGate(block.router, block.router.layer.weight, block.top_k, block.moe_normalize_expert_weights)
    return Parts(gate, DbrxExperts(block.experts, block.experts.num_experts))


def jetmoe(block: Block) -> Parts:
    """Two stacks in the block itself; a bias is added to what its experts return."""
    gate = JetMoeGate(block.router, block.router.layer.weight, block.router.top_k)
    return Parts(gate, JetMoeExperts(block), Bias(block))


def switch_transformers(block: Block) -> Parts:
    """Capacity per sequence, one module per expert."""
    gate = SwitchTransformersGate(block.router, block.router.classifier.weight, 1)
    return Parts(gate, ListedExperts(block.experts))


FAMILIES: dict[str, Callable[[Any], Parts]] = {
    "DbrxFFN": dbrx,
    "GptOssMLP": gpt_oss,
    "JetMoeMoE": jetmoe,
    "Llama4TextMoe": llama4,
    "PhimoeSparseMoeBlock": phimoe,
    "SwitchTransformersSparseMLP": switch_transformers,
}

# experts that do something of their own, in a block that is kept
EXPERTS: dict[str, Callable[[Any], FusedExperts]] = {"LongcatFlashExperts": LongcatFlashExperts}

# blocks with a child called `experts` that is no mixture of feed-forward networks: they stay as they are
NOT_FEED_FORWARD = {
    "JetMoeAttention": "its experts are projections of an attention",
    "VitPoseBackboneMoeMLP": "its experts are heads for data sets, chosen by the caller, and not by a router",
}


def _only(children: dict[str, nn.Module], names: tuple[str, ...]) -> Any:
    """Take the first of these children out; None: there is none."""
    return next((children.pop(name) for name in names if name in children), None)
