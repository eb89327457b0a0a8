"""What a job would take, from the planner: `--plan`, which starts nothing, and the layout of `--elastic`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from options import Job
from turnout.dispatch.autoselect.profile import Profile
from turnout.models.planner import Architecture, Cluster, Estimate, Estimator, Layout, search, tables
from turnout.models.planner.automatic import runnable
from turnout.models.planner.layout import ZERO
from turnout.models.planner.update import Update
from turnout.models.planner.volume import traffic


def cluster_of(job: Job, ranks_per_node: int | None = None) -> Cluster:
    cluster = Cluster.load(job.cluster)
    if job.links:
        cluster = cluster.with_links(Profile.load(job.links))
    return replace(cluster, ranks_per_node=ranks_per_node) if ranks_per_node else cluster


def dtype_of(job: Job) -> str:
    return "bf16" if job.bf16 else "fp16" if job.fp16 else "fp32"


def layout_of(job: Job, ranks: int) -> Layout:
    """Of a job whose flags fit so many ranks: `Job.fit`."""
    dp, micro_batches = ranks // job.pp // job.cp // job.tp, job.micro_batches * job.accumulate
    return Layout(
        pp=job.pp,
        tp=job.tp,
        dp=dp,
        ep=1 if job.dense else job.ep,
        etp=1 if job.dense else job.etp,
        micro_batch=job.batch // dp // micro_batches,
        micro_batches=micro_batches,
        virtual=max(1, job.virtual, 2 if job.pp > 1 and job.schedule not in ("gpipe", "1f1b") else 1),
        schedule=job.schedule,
        recompute="full" if job.recompute == "sqrt" else job.recompute,
        zero=ZERO.index(job.data_parallel),
        dtype=dtype_of(job),
        **splits(job),
    )


def splits(job: Job) -> dict[str, Any]:
    """Fields of a `Layout` that no search changes: ranks that split sequences."""
    return {"cp": job.cp, "cp_attention": job.cp_attention or None}


def update_of(job: Job) -> Update:
    return Update(job.optimizer, job.ema > 0)


def check(job: Job) -> None:
    """Raise a ValueError for flags that the planner does not model."""
    if job.objective != "clm":
        raise ValueError(f"--objective {job.objective}: the planner knows GPTs alone, so this job cannot be planned")


def elastic(job: Job, ranks: int, ranks_per_node: int) -> Job:
    """The job in the best layout for the ranks that are here; the model and the batch stay what they are.

    Raises:
        ValueError: there is none, in the planner's words.
    """
    check(job)
    cluster = runnable(cluster_of(job, ranks_per_node))
    found = search(Architecture.of(job.config()), cluster, ranks, job.batch, splits(job), dtype_of(job), update_of(job))
    at = found.plans[0].layout
    return replace(
        job,
        pp=at.pp,
        tp=at.tp,
        ep=at.ep,
        etp=at.etp,
        micro_batches=at.micro_batches,
        accumulate=1,
        schedule=at.schedule,
        virtual=at.virtual if at.pp > 1 else 0,
        data_parallel=at.data,
        recompute=at.recompute,
    )


def plan(job: Job, ranks: int, train_tokens: int | None) -> str:
    """What the job, whose flags fit so many ranks, is, takes and holds; and what would be better.

    `train_tokens`: tokens of the data, of text its bytes; None if it is not there.
    """
    check(job)
    cluster, model = cluster_of(job), Architecture.of(job.config())
    estimate = Estimator(model, cluster, job.batch, update=update_of(job))(layout_of(job, ranks))
    at, tokens = estimate.layout, job.steps * job.batch * job.seq
    warnings = tables.warnings(model, cluster, estimate)
    over = f"{job.steps:,} steps, {tokens:,} tokens, of data that is not here"
    if train_tokens is not None:
        passes = tokens / train_tokens
        over = f"{job.steps:,} steps, {tokens:,} tokens, {passes:,.1f} times over the {train_tokens:,} of the data"
        if passes > job.epochs:
            warnings.append(
                f"the data is passed over {passes:,.0f} times, and the job refuses more than --epochs ({job.epochs}): "
                "more --data, fewer --steps, or more --epochs"
            )
    if job.pp > 1 and job.accumulate > 1:
        warnings.append(f"--accumulate {job.accumulate} fills the pipeline anew for each part: the bubble is larger")
    split = f"cp {at.cp}, " if at.cp > 1 else ""
    hours = estimate.seconds * job.steps / 3600
    sent = "".join(f"\n| {axis} | {size / 1e6:,.4g} |" for axis, size in traffic(model, at).items())
    parts = [
        tables.describe(model, cluster, job.batch),
        f"{ranks} ranks: pp {at.pp}, dp {at.dp}, {split}tp {at.tp}; ep {at.ep}, edp {at.edp}, etp {at.etp}; "
        f"{at.micro_batches} micro-batches of {at.micro_batch}",
        over,
        tables.memory_table(estimate, cluster),
        f"| axis | MB that a rank sends in a step |\n|---|---|{sent}" if sent else "nothing is sent between ranks",
        tables.time_table(estimate),
        f"{hours:,.3g} hours; {estimate.tokens / estimate.seconds:,.0f} tokens/s, MFU {estimate.mfu:.1%}",
        *(f"warning: {warning}" for warning in warnings),
        better(job, estimate, cluster, model),
    ]
    return "\n\n".join(parts)


def better(job: Job, estimate: Estimate, cluster: Cluster, model: Architecture) -> str:
    """The best layout that a search finds, in flags."""
    try:
        best = search(
            model, cluster, estimate.layout.ranks, job.batch, splits(job), dtype_of(job), update_of(job)
        ).plans[0]
    except ValueError as error:
        return str(error)
    if best.seconds > 0.99 * estimate.seconds and estimate.fits:
        return "no layout that the planner knows is faster"
    at = best.layout
    virtual = f" --virtual {at.virtual}" if at.pp > 1 else ""
    return (
        f"{best.seconds:.3g} s a step with --pp {at.pp} --tp {at.tp} --ep {at.ep} --etp {at.etp} --micro-batches "
        f"{at.micro_batches} --schedule {at.schedule}{virtual} --data-parallel {at.data} --recompute {at.recompute}"
    )
