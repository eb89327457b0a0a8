"""What context-parallel ranks exchange in each attention (`context_parallel`)."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

from .architecture import Architecture
from .layout import Layout, way


class Exchanges(NamedTuple):
    """Exchanges of one rank in the attention of one block, for one micro-batch, forward and backward."""

    bytes: float = 0.0  # that the rank sends
    number: int = 0


def exchanges(model: Architecture, layout: Layout, size: int) -> Exchanges:
    """Exchanges of an attention: all-to-alls with Ulysses, or keys and values that go round a ring of ranks.

    Args:
        model: the model.
        layout: the layout.
        size: bytes of each number.
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
