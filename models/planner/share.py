"""A rank's share of a model: blocks, parameters, and micro-batches in flight."""

from __future__ import annotations

from typing import NamedTuple

from ..pipeline.partition import cut
from .architecture import Architecture
from .layout import Layout


class Share(NamedTuple):
    """Blocks of one rank of the pipeline."""

    dense: int  # blocks with a dense feed-forward network
    mixtures: int  # blocks with experts. Blocks of further tokens count in both numbers
    first: bool  # has the embedding
    last: bool  # has the head

    @property
    def blocks(self) -> int:
        """Number of blocks of both kinds."""
        return self.dense + self.mixtures

    def dense_parameters(self, model: Architecture, tp: int) -> float:
        """Parameters outside the routed experts. tp splits them, except routers and shared experts."""
        split = self.blocks * model.attention_parameters + self.dense * model.ffn_parameters
        split += model.embedding_parameters * self.embeds(model) + model.head_parameters * self.last
        whole = model.dim * (2 if model.plain else 1) + model.mtp * model.join_parameters if self.last else 0
        return split / tp + whole + self.mixtures * model.router_parameters

    def hidden_parameters(self, model: Architecture, tp: int) -> float:
        """Parameters of matrices in blocks, outside the routed experts. Muon steps these and the experts."""
        split = self.blocks * model.attention_matrices + self.dense * model.matrices * model.dim * model.ffn
        return split / tp + self.mixtures * model.matrices * model.dim * model.hidden * model.shared

    def embeds(self, model: Architecture) -> bool:
        """Whether the rank has the embedding: for its tokens, as the head, or for further tokens."""
        return self.first or (self.last and (model.tied or model.mtp > 0))

    def expert_parameters(self, model: Architecture, layout: Layout) -> float:
        """Parameters of routed experts on this rank."""
        return self.mixtures * model.expert_parameters / (layout.ep * layout.etp)


def shares(model: Architecture, layout: Layout) -> list[Share]:
    """The share of each rank along pp, in order. Stages are cut as `Stages` cuts them."""
    p, v = layout.pp, layout.virtual
    stages = stage_blocks(model, p * v)
    ranks = []
    for rank in range(p):
        own = [rank, 2 * p - 1 - rank] if layout.schedule == "zbv" else list(range(rank, p * v, p))
        if p == 1:
            own = list(range(len(stages)))
        blocks = [block for stage in own for block in stages[stage]]
        blocks += [model.layers - 1] * model.mtp if len(stages) - 1 in own else []
        mixtures = sum(map(model.is_moe, blocks))
        ranks.append(Share(len(blocks) - mixtures, mixtures, 0 in own, len(stages) - 1 in own))
    return ranks


def stage_blocks(model: Architecture, number: int) -> list[range]:
    """The blocks of each of `number` stages, as `Stages.of` cuts a model."""
    width = 2 * model.q_dim
    costs = [model.active(index) + width * model.span(index) for index in range(model.layers)]
    head = model.vocab * model.dim
    further = model.active(model.layers - 1) + 2 * model.dim * model.dim + width * model.seq + head
    extra = head + model.mtp * further
    size, rest = divmod(model.layers, number)
    if not rest and extra <= costs[-1] and len(set(costs)) == 1:  # `cut` finds equal stages, in much more time
        return [range(size * index, size * (index + 1)) for index in range(number)]
    costs[-1] += extra
    return list(cut(costs, number))


def in_flight(layout: Layout, rank: int = 0) -> float:
    """Most micro-batches whose activations a rank holds at once, each of all its layers.

    docs/explanations/pipeline.md has the table. The simulator counts the same numbers from the schedules' actions.
    """
    p, m, v = layout.pp, layout.micro_batches, layout.virtual
    if p == 1:
        return 1.0
    if layout.schedule == "gpipe":
        return float(m)
    if layout.schedule == "1f1b":
        return float(min(m, p - rank))
    if layout.schedule == "interleaved1f1b":
        return min(float(m), p + (p - 1 - 2 * rank) / v)
    return float(min(m, p))


def bubble(layout: Layout) -> float:
    """Time that a rank waits in a step over the time it computes (PTD-P, section 2.2).

    Zero-bubble schedules keep a third of it, because they fill the rest with halves of the backward (arXiv:2401.10241).
    """
    p, m, v = layout.pp, layout.micro_batches, layout.virtual
    if layout.schedule in ("gpipe", "1f1b"):
        return (p - 1) / m
    return (p - 1) / (m * v * (1 if layout.schedule == "interleaved1f1b" else 3))
