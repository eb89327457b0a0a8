"""Which families of Hugging Face's transformers there is a bridge for: one adapter, block -> `Parts`, each.

They are told by the name of the block's class, so that nothing here imports transformers. What each router does
is in docs/guides/hugging_face.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .block_experts import DbrxExperts, FusedExperts, GptOssExperts, ListedExperts
from .block_gates import DbrxGate, Llama4Gate, PhimoeGate, RouterGate, SwitchTransformersGate
from .block_parts import Parts

Block = Any  # attributes of transformers' modules are not typed


class GatedShared(nn.Module):
    """A shared expert times a sigmoid of the token (Qwen2-MoE)."""

    def __init__(self, expert: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.expert, self.gate = expert, gate

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return torch.sigmoid(self.gate(x)) * self.expert(x)


def common(block: Block, router: str = "gate", score: str = "softmax") -> Parts:
    """What transformers 5 has made of most families: a router with a `weight`, fused experts, maybe shared ones."""
    own = getattr(block, router)
    gate = RouterGate(own, own.weight, own.top_k, score)
    return Parts(gate, FusedExperts(block.experts), getattr(block, "shared_experts", None))


def mixtral(block: Block) -> Parts:
    """Noise on what router and experts see, in training."""
    parts = common(block)
    return Parts(parts.gate, parts.experts, jitter=block.jitter_noise)


def phimoe(block: Block) -> Parts:
    """Noise twice in training: here, and in the router, which writes its own to its input."""
    gate = PhimoeGate(block.router, block.router.weight, 2)
    return Parts(gate, FusedExperts(block.experts), jitter=block.input_jitter_noise)


def qwen2_moe(block: Block) -> Parts:
    """A shared expert with a gate of its own."""
    parts = common(block)
    return Parts(parts.gate, parts.experts, GatedShared(block.shared_expert, block.shared_expert_gate))


def gpt_oss(block: Block) -> Parts:
    """Transposed, interleaved, with biases; a pair is returned."""
    gate = RouterGate(block.router, block.router.weight, block.router.top_k)
    return Parts(gate, GptOssExperts(block.experts, transposed=True), pair=True)


def llama4(block: Block) -> Parts:
    """The weight multiplies what enters an expert; a pair is returned."""
    gate = Llama4Gate(block.router, block.router.weight, block.router.top_k, "sigmoid")
    experts = FusedExperts(block.experts, transposed=True, weight_first=True)
    return Parts(gate, experts, block.shared_expert, pair=True)


def dbrx(block: Block) -> Parts:
    """The choice is made in the block."""
    gate = DbrxGate(block.router, block.router.layer.weight, block.top_k, block.moe_normalize_expert_weights)
    return Parts(gate, DbrxExperts(block.experts, gate.num_experts))


def switch_transformers(block: Block) -> Parts:
    """Capacity per sequence, one module per expert."""
    gate = SwitchTransformersGate(block.router, block.router.classifier.weight, 1)
    return Parts(gate, ListedExperts(block.experts))


FAMILIES: dict[str, Callable[[Any], Parts]] = {
    "DbrxFFN": dbrx,
    "DeepseekV2Moe": common,
    "DeepseekV3MoE": partial(common, score="sigmoid"),
    "Ernie4_5_MoeSparseMoeBlock": common,
    "Glm4MoeMoE": partial(common, score="sigmoid"),
    "GptOssMLP": gpt_oss,
    "GraniteMoeMoE": partial(common, router="router"),
    "JambaSparseMoeBlock": partial(common, router="router"),
    "Llama4TextMoe": llama4,
    "MixtralSparseMoeBlock": mixtral,
    "OlmoeSparseMoeBlock": common,
    "PhimoeSparseMoeBlock": phimoe,
    "Qwen2MoeSparseMoeBlock": qwen2_moe,
    "Qwen3MoeSparseMoeBlock": common,
    "SwitchTransformersSparseMLP": switch_transformers,
}
