"""Memory of a rank by kind, in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .architecture import Architecture
from .cluster import Cluster
from .layout import Layout
from .share import Share, in_flight
from .update import ADAMW, AVERAGE_BYTES, Update


class Memory(NamedTuple):
    """Memory of the fullest rank by kind, in bytes."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    average: float = 0.0  # of the weights, if the job keeps one
    activations: float = 0.0  # of the micro-batches in flight, and of the block that is in its backward
    dispatch: float = 0.0  # buffers of an exchange of rows, sent and received
    head: float = 0.0  # logits in the computing dtype and in float32
    gathered: float = 0.0  # parameters that ZeRO gathers for a while, in the computing dtype
    other: float = 0.0  # fragments, context, buffers of communication

    @property
    def total(self) -> float:
        """Bytes of all kinds together."""
        return sum(self)


def size_of(dtype: str) -> int:
    """Bytes of a number of this dtype."""
    return 4 if dtype == "fp32" else 2


def memory(
    model: Architecture,
    cluster: Cluster,
    layout: Layout,
    share: Share,
    rank: int,
    sequence_parallel: bool,
    update: Update = ADAMW,
) -> Memory:
    """Memory of one rank of the pipeline at its peak."""
    software, size = cluster.software, size_of(layout.dtype)
    dense, experts = share.dense_parameters(model, layout.tp), share.expert_parameters(model, layout)
    zero = layout.zero_in_effect
    sharded = dense / layout.replicas + experts / layout.edp

    def held(stage: int) -> float:
        return sharded if zero >= stage else dense + experts

    hidden = share.hidden_parameters(model, layout.tp), experts
    stepped = hidden[0] / layout.replicas + hidden[1] / layout.edp if zero else sum(hidden)

    blocks = Activations(model, cluster, layout, sequence_parallel)
    kept = share.dense * blocks.kept(False) + share.mixtures * blocks.kept(True)
    inside = max(blocks.whole(False) if share.dense else 0.0, blocks.whole(True) if share.mixtures else 0.0)
    kept += 4 * size * blocks.own * model.dim * model.mtp * share.last  # inputs of norms and of the join
    activations = kept * in_flight(layout, rank) + (inside if layout.recompute == "full" else 0.0)
    logits = blocks.tokens * model.vocab / layout.tp * (size + 8) * (1 + model.mtp) * share.last
    gathered = 0.0
    if zero == 3:  # the block in use and the next one
        gathered = 2 * size * (dense + experts) / max(1, share.blocks)
    elif zero and software.weight_bytes > size:
        gathered = size * (dense + experts)
    return Memory(
        weights=software.weight_bytes * held(3),
        gradients=software.gradient_bytes * held(2),
        optimizer=software.optimizer_bytes * held(1) - update.saved_bytes(stepped),
        average=AVERAGE_BYTES * held(1) * update.ema,
        activations=activations,
        dispatch=4 * blocks.rows * model.dim * size if share.mixtures and layout.ep > 1 else 0.0,
        head=logits,
        gathered=gathered,
        other=1e9 * software.reserve_gb + software.fragmentation * (activations + logits),
    )


def best_segment(blocks: int, kept: float, inside: float, in_flight: float = 1.0) -> int:
    """Number of blocks in a segment of full recomputation that needs least memory (``recompute(every=...)``).

    With c blocks in a segment, each micro-batch in flight keeps blocks / c inputs. The segment in its backward holds
    all activations inside it. With one micro-batch in flight, c = sqrt(l A_in / A_mid) is best (PTD-P, section 3.5).

    >>> best_segment(blocks=64, kept=1.0, inside=1.0)  # sqrt(l)
    8
    """

    def held(size: int) -> float:
        return in_flight * -(-blocks // size) * kept + size * inside

    return min(range(1, blocks + 1), key=held)


@dataclass(frozen=True)
class Activations:
    """Bytes of activations that one block keeps for the backward of one micro-batch, on one rank.

    For the GPT of PTD-P with dropout and unfused attention: s b h (10 + 24 / t + 5 a s / (h t)), and with sequence
    parallelism s b h (34 / t + 5 a s / (h t)), as in arXiv:2205.05198, equations 2 and 4.
    """

    model: Architecture
    cluster: Cluster
    layout: Layout
    sequence_parallel: bool

    @cached_property
    def tokens(self) -> int:
        """Tokens of a micro-batch, on the tp ranks together."""
        return self.layout.micro_batch * self.model.seq // self.layout.cp

    @cached_property
    def own(self) -> float:
        """Tokens whose hidden states one rank holds between blocks."""
        return self.tokens / self.layout.tp if self.sequence_parallel else self.tokens

    @cached_property
    def rows(self) -> float:
        """Rows that the experts of one rank receive in one mixture."""
        model = self.model
        return self.tokens / self.layout.tp * model.top_k * model.load_factor * self.layout.etp

    def kept(self, mixture: bool) -> float:
        """Bytes that stay until the backward."""
        if self.layout.recompute == "full":
            return size_of(self.layout.dtype) * self.own * self.model.dim
        return self.whole(mixture, core=self.layout.recompute == "none")

    def whole(self, mixture: bool, core: bool = True) -> float:
        """Bytes that the forward saves. ``core=False`` leaves out the core of attention and the experts' inside."""
        model, software, size = self.model, self.cluster.software, size_of(self.layout.dtype)
        tp, width = self.layout.tp, self.own * model.dim
        total = 4.0 * size * width + (2 * width if software.dropout else 0)  # inputs of norms and of products, masks
        total += size * self.tokens * (2 * model.q_dim + 2 * model.kv_dim) / tp  # queries, keys, values, and their sum
        total += size * self.tokens * (model.q_dim + model.kv_dim) / tp * model.qk_norm
        if core and software.attention == "unfused":
            scores = self.layout.micro_batch * model.heads * model.seq**2 / tp / self.layout.cp
            total += scores * (2 * size + 1 if software.dropout else size)
        elif core:
            total += size * model.seq**2 * model.windowed  # the mask
        if not mixture:
            return total + size * self.tokens * model.matrices * model.ffn / tp
        total += 12 * self.tokens / tp * model.experts  # logits, scores and their gradient, in float32
        total += size * self.rows * model.dim
        if core:
            total += size * self.rows * model.matrices * model.hidden / self.layout.etp
        return total + size * self.tokens / tp * model.matrices * model.hidden * model.shared
