"""The cost model, put together: time and memory of a step in one layout."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

from ...dispatch.autoselect.profile import Message
from .architecture import Architecture
from .block_time import Blocks, Time
from .breakdown import Breakdown, Estimate
from .cluster import Cluster
from .context import exchanges
from .layout import Layout
from .links import Group
from .memory import Memory, memory, size_of
from .placement import Placement
from .roofline import Kernels
from .share import Share, bubble, shares
from .update import ADAMW, AVERAGE_BYTES, Update


class PerBlock(NamedTuple):
    """Seconds of one block for one micro-batch: computing, and communication along tp, ep and cp."""

    time: Time
    tp: float
    ep: float
    cp: float

    @property
    def compute(self) -> float:
        """Seconds of computing, forward and backward, with recomputation."""
        return self.time.forward + self.time.backward


class Estimator:
    """Estimates layouts of one model on one cluster. Parts that several layouts share are computed once."""

    def __init__(
        self,
        model: Architecture,
        cluster: Cluster,
        batch: int,
        placement: Placement | None = None,
        update: Update = ADAMW,
    ) -> None:
        self.model, self.cluster, self.batch, self.update = model, cluster, batch, update
        self.placement = Placement(cluster) if placement is None else placement
        self.block = cache(self._block)
        self.ends = cache(self._ends)
        self.shares = cache(self._shares)

    def sequence_parallel(self, layout: Layout) -> bool:
        """Whether the tp ranks split sequences between blocks (sequence parallelism)."""
        return layout.tp > 1 and (layout.recompute in self.cluster.software.sequence_parallel)

    def memory(self, layout: Layout) -> Memory:
        """Memory of the fullest rank: the first, with most micro-batches in flight, or the last, with the head."""
        ranks, sequences = self.shares(layout.pp, layout.virtual, layout.schedule), self.sequence_parallel(layout)
        ends = [
            memory(self.model, self.cluster, layout, ranks[r], r, sequences, self.update) for r in {0, layout.pp - 1}
        ]
        return max(ends, key=lambda held: held.total)

    def fits(self, held: Memory) -> bool:
        """Whether a device has this much memory."""
        return held.total <= 1e9 * self.cluster.device.memory_gb

    def __call__(self, layout: Layout) -> Estimate:
        """Estimate a layout that `misfit` accepts."""
        model, software = self.model, self.cluster.software
        ranks = self.shares(layout.pp, layout.virtual, layout.schedule)
        sequences = self.sequence_parallel(layout)
        needs = self.memory(layout)
        dense, mixture = self.blocks(layout)
        ends = layout.tp, layout.cp, layout.micro_batch, layout.dtype, sequences
        embedding, head, reduced = self.ends(*ends, layout.ranks)
        join = sum(self.parts(*ends).join()) if model.mtp else 0.0
        m, p, v = layout.micro_batches, layout.pp, layout.virtual

        def of(share: Share) -> tuple[float, float, float, float]:
            """Seconds of a micro-batch on a rank with this share: computing, and communication along tp, ep and cp."""
            depths = model.mtp * share.last
            compute = share.dense * dense.compute + (share.first + depths) * sum(embedding)
            compute += (share.last + depths) * sum(head) + depths * join
            tp, ep = share.dense * dense.tp + reduced * (share.first + share.last + 2 * depths), 0.0
            if mixture is not None:
                compute += share.mixtures * mixture.compute
                tp, ep = tp + share.mixtures * mixture.tp, share.mixtures * mixture.ep
            return compute, tp, ep, share.blocks * dense.cp

        send = self.send(layout, sequences)
        pp = 2 * v * send if p > 1 else 0.0  # each stage on a rank sends its output, and gradients back

        def hidden(compute: float, tp: float, ep: float, cp: float) -> float:
            """Seconds of communication that the computing of the same micro-batch hides."""
            return min(compute, software.tp_overlap * tp + software.pp_overlap * pp + software.ep_overlap * ep)

        times = {share: of(share) for share in set(ranks)}
        # what a rank computes and waits for in a micro-batch, messages between stages apart
        busy = {share: sum(time) - hidden(*time) for share, time in times.items()}
        compute, tp, ep, cp = fullest = times[max(busy, key=busy.__getitem__)]
        exposed = tp + pp + ep + cp - hidden(*fullest)
        idle = bubble(layout) * m * sum(busy[share] for share in ranks) / p if p > 1 else 0.0
        idle += 2 * (p - 1) * send  # first and last message of the way through the stages
        dp, dp_exposed, optimizer = self.data(layout, ranks, m * compute, compute)
        each = {"compute": compute, "tp": tp, "pp": pp, "ep": ep, "cp": cp}
        breakdown = Breakdown(
            **{part: m * time for part, time in each.items()},
            pipeline_bubble=idle,
            dp=dp,
            optimizer=optimizer,
            exposed=m * exposed + dp_exposed,
        )
        if cores := self.cluster.cores:  # while one rank waits another computes: a step takes no less than all cores do
            mean = m * (sum(sum(times[share]) for share in ranks) / p + pp) + dp + optimizer
            work = mean * min(layout.ranks, self.cluster.ranks_per_node) / cores
            breakdown = replace(breakdown, cores=max(0.0, work - breakdown.total))
        return Estimate(
            layout=layout,
            breakdown=breakdown,
            memory=needs,
            fits=self.fits(needs),
            tokens=self.batch * model.seq,
            flops=model.flops(self.batch, layout.recompute),
            model_flops=model.flops(self.batch),
            peak=self.cluster.device.peak(layout.dtype),
            transport=self.transport(layout)[0] if model.moe_blocks else "",
            placement=self.placement,
        )

    def blocks(self, layout: Layout) -> tuple[PerBlock, PerBlock | None]:
        """Times of a dense block, and of a mixture if the model has any."""
        halves = layout.pp > 1 and layout.schedule in ("interleaved_zb", "zbv")
        # what a block's times depend on, so that layouts that share it have it computed once
        key = replace(layout, pp=1, dp=layout.pp * layout.dp, micro_batches=1, virtual=1, schedule="1f1b", zero=0)
        return self.block(False, key, halves), self.block(True, key, halves) if self.model.moe_blocks else None

    def stage(self, layout: Layout, blocks: range, first: bool, last: bool) -> tuple[float, float]:
        """Seconds of a micro-batch in one stage, forward and backward, with what it waits for along tp and ep."""
        dense, mixture = self.blocks(layout)
        embedding, head, reduced = self.ends(
            layout.tp, layout.cp, layout.micro_batch, layout.dtype, self.sequence_parallel(layout), layout.ranks
        )
        depths = self.model.mtp * last
        blocks_here = [*blocks, *[self.model.layers - 1] * depths]
        ends = [embedding] * (first + depths) + [head] * (last + depths)
        forward = sum(end.forward + reduced / 2 for end in ends)
        backward = sum(end.backward + reduced / 2 for end in ends)
        passes = 3 if layout.recompute == "full" else 2  # of which one is the forward
        for index in blocks_here:
            block = mixture if mixture is not None and self.model.is_moe(index) else dense
            forward += block.time.forward + (block.tp + block.ep + block.cp) / passes
            backward += block.time.backward + (block.tp + block.ep + block.cp) * (1 - 1 / passes)
        return forward, backward

    def group(self, size: int, stride: int, ranks: int, slowdown: float = 1.0) -> Group:
        """The ranks along one axis, of a job with `ranks` ranks."""
        return Group(self.cluster, size, stride, slowdown, ranks)

    def send(self, layout: Layout, sequences: bool) -> float:
        """Seconds to send the hidden states of a micro-batch to the next stage (`Boundary`)."""
        if layout.pp == 1:
            return 0.0
        whole = layout.micro_batch * self.model.seq // layout.cp * self.model.dim * size_of(layout.dtype)
        there = self.group(layout.pp, layout.stage, layout.ranks, self.placement.slowdown("pp", layout))
        if sequences or layout.tp == 1:
            return there.send(whole / layout.tp)
        if not self.cluster.software.scatter_gather:
            return there.send(whole)
        return there.send(whole / layout.tp) + self.group(layout.tp, 1, layout.ranks).all_gather(whole)

    def transport(self, layout: Layout) -> tuple[str, float]:
        """The transport that the runtime would choose, and its seconds in one mixture, forward and backward."""
        model, size = self.model, size_of(layout.dtype)
        tokens = layout.micro_batch * model.seq / layout.tp / layout.cp * model.load_factor
        row = model.dim * size
        group = self.group(layout.ep, layout.etp, layout.ranks, self.placement.slowdown("ep", layout))
        # etp ranks of an expert share their rows: gathered, and summed again on the way home
        shared = self.group(layout.etp, 1, layout.ranks).all_gather(tokens * model.top_k * layout.etp * row)
        message = Message(max(1, round(tokens)), row, model.top_k, model.experts)
        name, seconds = min(group.all_to_all(message).items(), key=lambda entry: entry[1])
        return name, seconds + 4 * shared

    def data(self, layout: Layout, ranks: list[Share], computing: float, one: float) -> tuple[float, float, float]:
        """Seconds of communication along dp in a step, those that nothing hides, and seconds of the optimizer."""
        model, software, m = self.model, self.cluster.software, layout.micro_batches
        fullest = max(
            set(ranks), key=lambda s: s.dense_parameters(model, layout.tp) + s.expert_parameters(model, layout)
        )
        dense, experts = fullest.dense_parameters(model, layout.tp), fullest.expert_parameters(model, layout)
        zero = layout.zero_in_effect
        total, wire, size = 0.0, software.gradient_wire_bytes, size_of(layout.dtype)
        slow = self.placement.slowdown("dp", layout)
        for held, units, group in (  # FSDP2 wraps each block, experts by themselves, and what is in no block
            (dense, fullest.blocks + 1, self.group(layout.replicas, layout.tp, layout.ranks, slow)),
            (experts, fullest.mixtures, self.group(layout.edp, layout.ep * layout.etp, layout.ranks, slow)),
        ):
            if not zero:
                total += group.all_reduce(wire * held)
            else:  # reduce-scattered once a step, or after each micro-batch; gathered once, or twice a micro-batch
                scattered, gathered = wire * held, size * held
                total += (m if zero > 1 else 1) * (group.reduce_scatter(scattered) + group.wrapped(scattered, units))
                total += (2 * m if zero > 2 else 1) * (group.all_gather(gathered) + group.wrapped(gathered, units))
        tied = 0.0
        if layout.pp > 1 and (model.tied or model.mtp):  # both ends have the embedding, and add up its gradients
            matrix = wire * model.vocab * model.dim / layout.tp
            together = layout.ranks <= self.cluster.ranks_per_node
            tied = self.group(2, 1 if together else self.cluster.ranks_per_node, 2, slow).all_reduce(matrix)
        # ZeRO 3 gathers during the whole step; else the first forward and the last backward are beside it
        beside = computing if zero > 1 else one
        exposed = max(total * (1 - software.dp_overlap), total - beside) + tied
        own = dense / layout.replicas + experts / layout.edp if zero else dense + experts
        kernels = Kernels(self.cluster.device, self.cluster.device.peak(layout.dtype), size)
        moved = software.step_bytes + 3 * AVERAGE_BYTES * self.update.ema
        alone = self.update.orthogonalising(model, layout, fullest, self.cluster.device, zero)
        return total + tied, exposed, kernels.moved(moved * own) + alone

    def parts(self, tp: int, cp: int, micro_batch: int, dtype: str, sequences: bool) -> Blocks:
        """The parts of the model, for micro-batches of this size."""
        kernels = Kernels(self.cluster.device, self.cluster.device.peak(dtype), size_of(dtype))
        return Blocks(self.model, self.cluster.software, kernels, micro_batch, tp, sequences, cp)

    def _block(self, mixture: bool, layout: Layout, halves: bool) -> PerBlock:
        model, tp, ep, etp = self.model, layout.tp, layout.ep, layout.etp
        size, sequences = size_of(layout.dtype), self.sequence_parallel(layout)
        parts = self.parts(tp, layout.cp, layout.micro_batch, layout.dtype, sequences)
        core = parts.core()
        inside = parts.mixture(ep, etp) if mixture else parts.feed_forward()
        time = parts.attention() + core + inside
        full = layout.recompute == "full"
        if full:
            time += (0.0, time.forward * (2 if halves else 1))  # in both halves of a backward
        elif layout.recompute == "selective":
            again = core.forward
            if mixture:
                rows = parts.tokens / tp * model.top_k * etp * model.load_factor
                experts = model.experts / ep
                again += parts.experts(experts, rows / experts, model.hidden / etp, model.matrices - 1).forward
            time += (0.0, again)
        # forward and backward, 8 b s h (t - 1) / t numbers of a dense block (PTD-P, section 3.2)
        times = (2 if not mixture else 1) * (3 if full else 2)
        exchanged = times * self.group(tp, 1, layout.ranks).exchange(parts.tokens * model.dim * size)
        trip = self.transport(layout)[1] * (1.5 if full else 1.0) if mixture else 0.0
        around = self.group(layout.cp, tp, layout.ranks).sent(*exchanges(model, layout, size))
        return PerBlock(time, exchanged, trip, around)

    def _ends(
        self, tp: int, cp: int, micro_batch: int, dtype: str, sequences: bool, ranks: int
    ) -> tuple[Time, Time, float]:
        """Times of embedding and head, and seconds of the tp exchange at each of them, one way."""
        parts = self.parts(tp, cp, micro_batch, dtype, sequences)
        whole = parts.tokens * self.model.dim * size_of(dtype)
        return parts.embedding(), parts.head(), self.group(tp, 1, ranks).exchange(whole)

    def _shares(self, pp: int, virtual: int, schedule: str) -> list[Share]:
        return shares(self.model, Layout(pp=pp, virtual=virtual, schedule=schedule))
