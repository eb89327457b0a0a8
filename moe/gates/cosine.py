"""Top-k by angle, in a space of few dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gate import projected, uniform
from .topk import TopKGate

LEAST = 0.01  # temperature


class CosineGate(TopKGate):
    """The k experts nearest in angle: logits cos(W x, e_i) / temperature (X-MoE, Chi et al. 2022, arXiv:2204.09179).

    Tokens are projected to few dimensions, so that the router cannot pull all of them towards the experts'
    embeddings, and only directions count there. The temperature is learned, 0.01 at least. From the logits on
    it is `TopKGate`.

    Args:
        dim, num_experts, top_k: see `Gate`.
        width: dimensions of the space; None: E / 2, the paper's, at least 2 and at most D.
        temperature: at the start.
        options: further ones of `TopKGate`.
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
            raise ValueError("the cosine gate's logits are angles, which have no bias: leave bias=True out")
        super().__init__(dim, num_experts, top_k, **options)
        width = min(max(num_experts // 2, 2), dim) if width is None else width
        if width < 1 or temperature < LEAST:
            raise ValueError(f"width={width} must be positive, and temperature={temperature} at least {LEAST}")
        self.start = temperature
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.projection = nn.Parameter(torch.empty(width, dim))
        self.temperature = nn.Parameter(torch.empty(1))  # not a scalar: FSDP2 takes none
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings and projection as `nn.Linear` has them, the temperature as given."""
        for name, p in self.named_parameters():
            nn.init.constant_(p, self.start) if name == "temperature" else uniform(p)

    def logits(self, x: Tensor) -> Tensor:
        """x [T, D] -> cosines over temperature [T, E], float32 or wider."""
        token = F.normalize(projected(x, self.projection), dim=1, eps=1e-6)  # more than the default's: its gradient
        temperature = self.temperature.to(token.dtype).clamp(min=LEAST)
        return projected(token, F.normalize(self.weight.to(token.dtype), dim=1)) / temperature
