"""Adapters: functions that take an MoE block of transformers apart into `Parts`.

`plain` recognises the parts of most families' blocks by their names. `FAMILIES` has adapters for blocks that do
something of their own, by the name of the block's class, so that nothing here imports transformers. Any other block
stays, and its experts alone are replaced (`recognise.py`). docs/guides/hugging_face.md says what each router does.
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
    """Shared expert, times the sigmoid of a linear gate on the token (Qwen2-MoE)."""

    def __init__(self, expert: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.expert, self.gate = expert, gate

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return torch.sigmoid(self.gate(x)) * self.expert(x)


class Bias(nn.Module):
    """Adds the block's parameter `bias` [D] to every token, in the place of shared experts (JetMoE)."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.bias, self._block = block.bias, (block,)  # in a tuple: not a submodule

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.bias.expand_as(x)

    def give_back(self) -> None:
        """Give the block the current bias. If it is sharded, every rank calls this."""
        gather(self)
        self._block[0].bias = self.bias


def plain(block: Block) -> Parts:
    """Parts of a block with a router and stacked experts, and maybe shared experts with a gate, and input noise.

    Raises:
        ValueError: the block has other children, or is called with more than hidden states.
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
    """PhiMoE: in training there is noise on the block's input, and again in the router, which writes to its input."""
    gate = PhimoeGate(block.router, block.router.weight, 2)
    return Parts(gate, FusedExperts(block.experts), jitter=block.input_jitter_noise)


def gpt_oss(block: Block) -> Parts:
    """gpt-oss: gate and up are interleaved, experts have biases, and the block returns a pair."""
    gate = RouterGate(block.router, block.router.weight, block.router.top_k)
    return Parts(gate, GptOssExperts(block.experts), pair=True)


def llama4(block: Block) -> Parts:
    """Llama 4: weights multiply the input of an expert, and the block returns a pair."""
    gate = Llama4Gate(block.router, block.router.weight, block.router.top_k, "sigmoid")
    experts = FusedExperts(block.experts, transposed=True, weight_first=True)
    return Parts(gate, experts, block.shared_expert, pair=True, flat=True)


def dbrx(block: Block) -> Parts:
    """DBRX: the block, and not its router, chooses the experts."""
    gate = DbrxGate(block.router, block.router.layer.weight, block.top_k, block.moe_normalize_expert_weights)
    return Parts(gate, DbrxExperts(block.experts, block.experts.num_experts))


def jetmoe(block: Block) -> Parts:
    """JetMoE: the block itself has the stacked matrices, and adds a bias to the output."""
    gate = JetMoeGate(block.router, block.router.layer.weight, block.router.top_k)
    return Parts(gate, JetMoeExperts(block), Bias(block))


def switch_transformers(block: Block) -> Parts:
    """Switch Transformers: a capacity for each sequence, and one module for each expert."""
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

# experts that do something of their own, in blocks that stay
EXPERTS: dict[str, Callable[[Any], FusedExperts]] = {"LongcatFlashExperts": LongcatFlashExperts}

# blocks whose child `experts` is no mixture of feed-forward networks: they stay as they are
NOT_FEED_FORWARD = {
    "JetMoeAttention": "its experts are projections of an attention",
    "VitPoseBackboneMoeMLP": "its experts are heads for data sets, chosen by the caller, and not by a router",
}


def _only(children: dict[str, nn.Module], names: tuple[str, ...]) -> Any:
    """Take the first of these children out of the dict; None if it has none of them."""
    return next((children.pop(name) for name in names if name in children), None)
