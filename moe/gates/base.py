"""What a gate is, and what every gate would otherwise get wrong."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..routing import Routing


class Gate(nn.Module, ABC):
    """Scores tokens and picks their experts. Knows nothing of ranks.

    A new gate is one file: subclass, write `forward`, pass an instance to ``MoE(gate=...)``. Randomness
    belongs under ``if self.training``.

    Args:
        dim: model width D.
        num_experts: experts on all ranks together, E.
        top_k: experts a token picks, k. May be changed between steps.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int = 1) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must lie between 1 and num_experts={num_experts}")
        self.dim, self.num_experts, self.top_k = dim, num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the router as `nn.Linear` does: uniform within 1 / sqrt(D)."""
        bound = 1 / math.sqrt(self.dim)
        nn.init.uniform_(self.weight, -bound, bound)

    def logits(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, E], float32 or wider, whatever the model's dtype and autocast say."""
        dtype = torch.promote_types(x.dtype, torch.float32)  # not .float(): float64 stays float64
        with torch.autocast(x.device.type, enabled=False):  # inside, F.linear of float32 gives bfloat16
            return F.linear(x.to(dtype), self.weight.to(dtype))

    @abstractmethod
    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [T, D]."""

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}"


def normalised(weight: Tensor) -> Tensor:
    """Weights [T, k] that sum to 1 for each token; all zeros where they are."""
    return weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)


def jittered(x: Tensor, eps: float) -> Tensor:
    """x times noise drawn uniformly from [1 - eps, 1 + eps] (Switch Transformer, arXiv:2101.03961)."""
    return x * torch.empty_like(x).uniform_(1 - eps, 1 + eps)
