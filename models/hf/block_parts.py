"""What an adapter makes of a family's block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ...moe.experts.base import Experts
from ...moe.gates import Gate


@dataclass(frozen=True)
class Parts:
    """A block, taken apart into what a `MoE` is built from. Its modules go on being used, inside these.

    Attributes:
        gate: routes as the family does; most often a `RouterGate`.
        experts: most often `FusedExperts`. What has to happen to them when the block is put back is in their
            `give_back()`, if they have one; and so with `shared`.
        shared: what every token visits as well, [T, D] -> [T, D], or None.
        jitter: in training, what the block sees is multiplied by noise from [1 - jitter, 1 + jitter] first.
        pair: the block returned (y, something): so does the layer, with None for what the family's models ignore.
        flat: the block returned y as [T, D], whatever the shape of x.
    """

    gate: Gate
    experts: Experts
    shared: nn.Module | None = None
    jitter: float = 0.0
    pair: bool = False
    flat: bool = False
