"""What ranks that split sequences exchange in each attention: `context_parallel` in numbers."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

from .architecture import Architecture
from .layout import Layout, way


class Exchanges(NamedTuple):
    """Of one block and one micro-batch, forward and backward, on one rank."""

    bytes: float = 0.0  # that it sends
    number: int = 0


def exchanges(model: Architecture, layout: Layout, size: int) -> Exchanges:
    """Ulysses trades sequences for heads and back. In the ring keys and values go round, later with their gradients.

    Args:
        size: bytes of a number.
    """
    cp, tp, again = layout.cp, layout.tp, layout.recompute == "full"
    if cp == 1:
        return Exchanges()
    tokens = layout.micro_batch * model.seq / cp
    queries, keys = tokens * model.q_dim / tp, tokens * 2 * model.kv_dim / tp
    if way(model, layout) == "ring":
        hops = (cp - 1) * (3 if again else 2)
        return Exchanges(keys * (size * hops + 4 * cp), hops + cp)  # gradients travel home, in float32
    keys *= cp // gcd(cp, max(1, model.kv_heads // tp))  # ranks that share a head of keys and values each get it
    passes = 3 if again else 2
    return Exchanges(passes * (2 * queries + keys) * size * (cp - 1) / cp, passes * 4)
