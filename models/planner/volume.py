"""Bytes that a rank sends in a step, by axis, as the library's own layers and wrappers exchange them.

They are means over ranks, for an even load. Collectives count as in `examples/traffic.py`: (n - 1) / n of the whole for
an all-gather, a reduce-scatter or an all-to-all, and twice that for an all-reduce.
"""

from __future__ import annotations

from .architecture import Architecture
from .context import exchanges
from .layout import Layout
from .memory import size_of
from .share import Share, shares


def traffic(model: Architecture, layout: Layout) -> dict[str, float]:
    """Bytes that a rank sends in a step along each axis. "dp" includes "edp", along which experts are repeated.

    >>> gpt = Architecture.dense(layers=4, dim=128, heads=4, vocab=256, seq=128)
    >>> round(traffic(gpt, Layout(dp=2, dtype="fp32"))["dp"]) == 4 * gpt.parameters  # an all-reduce of two ranks
    True
    """
    ranks, size = shares(model, layout), size_of(layout.dtype)
    sent = {
        "tp": _mean(ranks, lambda share: _tensor(model, layout, share, size)),
        "cp": _mean(ranks, lambda share: share.blocks * layout.micro_batches * exchanges(model, layout, size).bytes),
        "pp": _pipeline(model, layout, size),
        "dp": _mean(ranks, lambda share: _data(model, layout, share, size)),
        "ep": _mean(ranks, lambda share: _experts(model, layout, share, size)),
    }
    return {axis: size for axis, size in sent.items() if size}


def _mean(ranks: list[Share], of) -> float:
    return sum(map(of, ranks)) / len(ranks)


def _tensor(model: Architecture, layout: Layout, share: Share, size: int) -> float:
    """Along tp, sequences are gathered before attention and dense networks, and scattered afterwards."""
    tokens = layout.micro_batch * layout.micro_batches * model.seq / layout.cp
    whole = tokens * model.dim * size
    full = layout.recompute == "full"
    exchanges = (3 if full else 2) * 2 * (2 * share.dense + share.mixtures)
    exchanges -= full * share.dense  # a recomputation stops where all is there again, before a block's last exchange
    depths = model.mtp * share.last  # each embeds further tokens, and has a norm before the head
    exchanges += 2 * share.first + 2 * share.last + 4 * depths  # the embedding's output, and the norm's before the head
    losses = share.last + depths
    loss = 12 * tokens * losses  # largest, sum and target's logit
    joins = 4 * model.join_parameters * depths  # whole on each rank, and so are their gradients, which are summed
    return (exchanges * whole + 2 * (loss + joins)) * (layout.tp - 1) / layout.tp


def _pipeline(model: Architecture, layout: Layout, size: int) -> float:
    """Along pp, each boundary is crossed forward and backward. Both ends add up the embedding's gradient."""
    p, v = layout.pp, layout.virtual
    whole = layout.micro_batch * layout.micro_batches * model.seq * model.dim * size / layout.tp / layout.cp
    crossed = 2 * (p - 1) if layout.schedule == "zbv" else p * v - 1
    shared = layout.schedule != "zbv" and (model.tied or model.mtp)
    tied = 2 * 4 * model.vocab * model.dim / layout.tp if shared else 0
    return (2 * crossed * whole + tied) / p if p > 1 else 0.0


def _data(model: Architecture, layout: Layout, share: Share, size: int) -> float:
    """Along dp, gradients travel in float32, and gathered parameters in the computing dtype."""
    total = 0.0
    zero = layout.zero_in_effect
    root = (model.embedding_parameters * share.embeds(model) + model.head_parameters * share.last) / layout.tp
    root += (model.dim + model.mtp * model.join_parameters) * share.last
    for held, number, whole in (
        (share.dense_parameters(model, layout.tp), layout.replicas, root),
        (share.expert_parameters(model, layout), layout.edp, 0.0),
    ):
        if not zero:
            sent = 2 * 4 * held
        else:
            m = layout.micro_batches
            # a block is gathered before its forward and its backward; what is not in a block, once
            gathers = m * (2 * held - whole) if zero == 3 else held
            sent = 4 * held * (m if zero > 1 else 1) + size * gathers
        total += sent * (number - 1) / number
    return total


def _experts(model: Architecture, layout: Layout, share: Share, size: int) -> float:
    """Along ep, rows go to their experts and back, forward and backward."""
    tokens = layout.micro_batch * layout.micro_batches * model.seq / layout.tp / layout.cp
    rows = tokens * model.top_k * (model.capacity or 1.0) * model.dim * size
    passes = 5 if layout.recompute == "full" else 4  # of a recomputation the way home is left out
    return share.mixtures * passes * rows * (layout.ep - 1) / layout.ep
