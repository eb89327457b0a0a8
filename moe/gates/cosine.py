"""Cosine gate (X-MoE): top-k of cosine similarities in a space of few dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gate import projected, uniform
from .topk import TopKGate

LEAST = 0.01  # lower bound of the temperature


class CosineGate(TopKGate):
    """Top-k routing by cosine similarity: logits are cos(W x, e_i) / temperature, and the rest is `TopKGate`.

    Tokens are projected to few dimensions, so that the router cannot pull all of them towards the experts' embeddings
    e_i. Only directions count there. The temperature is learned, and at least 0.01.

    Args:
        dim, num_experts, top_k: see `Gate`; `top_k` is 2 by default.
        width: number of dimensions of the projection. None, the default, takes E / 2 as in the paper, but at least 2
            and at most D.
        temperature: initial temperature, at least 0.01; 0.3 by default.
        options: further arguments of `TopKGate`.

    References:
        X-MoE: Chi et al. 2022, arXiv:2204.09179.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        width: int | None = None,
        temperature: float = 0.3,
        **options: Any,
    ) -> None:
        if options.get("bias"):
            raise ValueError("logits of the cosine gate are cosines, which take no bias: leave bias=True out")
        super().__init__(dim, num_experts, top_k, **options)
        width = min(max(num_experts // 2, 2), dim) if width is None else width
        if width < 1 or temperature < LEAST:
            raise ValueError(f"width={width} must be positive, and temperature={temperature} at least {LEAST}")
        self.start = temperature
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.projection = nn.Parameter(torch.empty(width, dim))
        self.temperature = nn.Parameter(torch.empty(1))  # [1], because FSDP2 refuses scalars
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise embeddings and projection as `nn.Linear` does, and the temperature as given."""
        for name, p in self.named_parameters():
            nn.init.constant_(p, self.start) if name == "temperature" else uniform(p)

    def logits(self, x: Tensor) -> Tensor:
        """Cosines divided by the temperature: x [T, D] -> [T, E], in float32 or float64."""
        token = F.normalize(projected(x, self.projection), dim=1, eps=1e-6)  # default eps makes gradients too large
        temperature = self.temperature.to(token.dtype).clamp(min=LEAST)
        return projected(token, F.normalize(self.weight.to(token.dtype), dim=1)) / temperature
