"""A layout: how a step is spread over the ranks, and which layouts can run."""

from __future__ import annotations

from dataclasses import dataclass

from ..context_parallel import How, attention_of
from ..data_parallel import Data
from ..gpt import GPTConfig
from ..pipeline.partition import PER_RANK
from .architecture import Architecture

ZERO: tuple[Data, ...] = ("replicate", "zero1", "zero2", "fsdp")  # by ZeRO's stage
RECOMPUTE = ("none", "selective", "full")  # each computes more twice than the one before, and holds less
DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the axes, as for `Meshes.of`, and the options of a step.

    Attributes:
        pp, tp, cp, dp, ep, etp: number of ranks along each axis. A job has dp * cp * tp * pp ranks, and
            edp * ep * etp = dp * cp * tp.
        micro_batch: number of sequences b in a micro-batch of one rank.
        micro_batches: number of micro-batches m in a step.
        virtual: number of pipeline stages v on each rank.
        schedule: name of a pipeline schedule, a key of `SCHEDULES`.
        recompute: activations that the backward computes again: "none", "selective" or "full".
        zero: stage of ZeRO, 0 to 3.
        dtype: dtype in which the model computes: "bf16", "fp16" or "fp32".
        cp_attention: attention over cp ranks, "ulysses" or "ring". None leaves the choice to `SequenceSplit.of`.
    """

    pp: int = 1
    tp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    micro_batch: int = 1
    micro_batches: int = 1
    virtual: int = 1
    schedule: str = "1f1b"
    recompute: str = "none"
    zero: int = 0
    dtype: str = "bf16"
    cp: int = 1
    cp_attention: How | None = None

    @property
    def ranks(self) -> int:
        """Number of all ranks."""
        return self.pp * self.stage

    @property
    def stage(self) -> int:
        """Number of ranks of one pipeline stage."""
        return self.dp * self.cp * self.tp

    @property
    def replicas(self) -> int:
        """Number of ranks that hold the same dense parameters."""
        return self.dp * self.cp

    @property
    def edp(self) -> int:
        """Number of ranks that hold the same experts."""
        return self.stage // (self.ep * self.etp)

    @property
    def zero_in_effect(self) -> int:
        """The stage of ZeRO that runs: in a pipeline, stages 2 and 3 do as 1 (`data_parallel`)."""
        return min(self.zero, 1) if self.pp > 1 else self.zero

    @property
    def data(self) -> Data:
        """The name of the ZeRO stage in `data_parallel`."""
        return ZERO[self.zero]


def way(model: Architecture, layout: Layout) -> How:
    """Attention over cp ranks, as the runtime chooses it: "ulysses" or "ring".

    Raises:
        ValueError: the model does not allow the layout's `cp_attention`.
    """
    config = GPTConfig(
        dim=model.dim, heads=model.heads, kv_heads=model.kv_heads, head_dim=model.head_dim, windows=model.windows
    )
    return attention_of(config, layout.cp, layout.tp, layout.cp_attention)


def misfit(layout: Layout, model: Architecture, batch: int) -> str | None:
    """Sentence that says why a layout cannot run, with the flag and the remedy. None if it can run."""
    # a generator, so that the first problem is all that is computed in a search
    return next(_misfits(layout, model, batch), None)


def _misfits(layout: Layout, model: Architecture, batch: int):
    at = layout

    def divides(what: str, whole: int, by: str, part: int):
        if whole % part:
            yield f"{what} ({whole}) must be a multiple of {by} ({part}); choose a divisor of {whole}"

    yield from divides("--heads", model.heads, "--tp", at.tp)
    yield from divides("--kv-heads", model.kv_heads, "--tp", at.tp)
    yield from divides("--vocab", model.vocab, "--tp", at.tp)
    yield from divides("--seq", model.seq, "--cp x --tp" if at.cp > 1 else "--tp", at.cp * at.tp)
    if at.cp > 1:
        try:
            ring = way(model, at) == "ring"
        except ValueError as error:
            yield str(error)
        else:
            yield from divides("--seq", model.seq, "2 x --cp x --tp", at.cp * at.tp * (2 if ring else 1))
    if model.layers > model.moe_blocks:
        yield from divides("--ffn", model.ffn, "--tp", at.tp)
    yield from divides("--batch", batch, "--dp x --micro-batch", at.dp * at.micro_batch)
    if model.experts:
        yield from divides("--experts", model.experts, "--ep", at.ep)
        yield from divides("--hidden", model.hidden, "--etp", at.etp)
        yield from divides("dp x cp x tp", at.stage, "--ep x --etp", at.ep * at.etp)
    elif at.ep * at.etp > 1:
        yield f"--ep ({at.ep}) and --etp ({at.etp}) split experts, and the model has none; leave them at 1"
    least, most = PER_RANK[at.schedule]
    if at.pp == 1:
        if at.virtual > 1:
            yield f"--virtual ({at.virtual}) needs a pipeline; with --pp 1 leave it at 1"
        return
    if at.virtual < least or (most and at.virtual > most):
        some = least if most == least else f"{least} or more"
        yield f"--virtual ({at.virtual}): --schedule {at.schedule} runs {some} stages on each rank"
    if model.layers < at.pp * at.virtual:
        yield (
            f"--layers ({model.layers}) cannot fill --pp x --virtual = {at.pp * at.virtual} stages; "
            "use a smaller --pp or --virtual"
        )
    if at.schedule == "gpipe":
        return
    if at.micro_batches < at.pp:
        yield (
            f"--schedule {at.schedule} needs at least --pp ({at.pp}) micro-batches, and --batch {batch} / (dp {at.dp} "
            f"x --micro-batch {at.micro_batch}) is {at.micro_batches}; use a larger --batch, a smaller --pp, or gpipe"
        )
    elif at.schedule.startswith("interleaved") and at.micro_batches % (at.micro_batches // at.pp):
        yield (
            f"--schedule {at.schedule} runs {at.micro_batches} micro-batches on --pp {at.pp} in "
            f"{at.micro_batches // at.pp} equal rounds; choose --batch and --micro-batch so that they are a multiple "
            f"of {at.pp}"
        )
