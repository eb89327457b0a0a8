"""`Parts`: an MoE block, taken apart."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ...moe.experts.base import Experts
from ...moe.gates import Gate


@dataclass(frozen=True)
class Parts:
    """The parts of an MoE block from which a `BridgedMoE` is built. They use the modules of the block.

    Attributes:
        gate: routes as the family does. Most often it is a `RouterGate`.
        experts: the routed experts. Most often they are `FusedExperts`. If they have a method `give_back`,
            `restore_moe` calls it before it puts the block back. The same holds for `shared`.
        shared: module [T, D] -> [T, D] that every token visits. None, the default, for blocks without one.
        jitter: half-width of the multiplicative noise on the block's input in training, uniform in
            [1 - jitter, 1 + jitter]; 0.0 by default.
        pair: whether the block returns a pair (y, something). The layer then returns (y, None). False by default.
        flat: whether the block returns y as [T, D] for any shape of x; False by default.
    """

    gate: Gate
    experts: Experts
    shared: nn.Module | None = None
    jitter: float = 0.0
    pair: bool = False
    flat: bool = False
