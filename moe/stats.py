"""How evenly the experts are used, and what was dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch.plan import load


@dataclass(frozen=True)
class Stats:
    """Load of one forward, on this rank. Tensors on the layer's device: reading one waits for it.

    Made from the routing before capacity drops anything, padding left out. For the load of all ranks sum up their
    `tokens_per_expert` (`torch.distributed.all_reduce`).

    Attributes:
        tokens_per_expert: int64 [E], assignments each expert was chosen for.
        dropped: share of assignments that capacity dropped, 0 to 1.
        entropy: of the load, over log E: 1 = even, log k / log E = all tokens on the same k experts.
        imbalance: largest load over the mean load: 1 = even, E / k = all tokens on the same k experts.
        nonfinite: bool, NaN or infinity among the gate's weights.
    """

    tokens_per_expert: Tensor
    dropped: Tensor
    entropy: Tensor
    imbalance: Tensor
    nonfinite: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, chosen: Tensor, kept: Tensor, weight: Tensor, num_experts: int) -> Stats:
        """Measure a routing: experts chosen and, after capacity, kept, int64 [T, k]; weight [T, k]. No host sync."""
        tokens = load(chosen, num_experts)
        total = tokens.sum().clamp(min=1)
        share = tokens / total
        return cls(
            tokens_per_expert=tokens,
            dropped=(tokens.sum() - (kept >= 0).sum()) / total,
            entropy=torch.special.entr(share).sum() / math.log(max(num_experts, 2)),
            imbalance=share.max() * num_experts,
            nonfinite=~weight.isfinite().all(),
        )
