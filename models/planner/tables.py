"""A plan as text: the best layouts, why others are slower, and memory by kind."""

from __future__ import annotations

from collections import Counter

from .architecture import Architecture
from .breakdown import Estimate
from .cluster import Cluster
from .memory import Activations, best_segment
from .search import Found
from .share import in_flight

REASONS = {  # what a part of the step is called where it is what a layout loses by
    "compute": "computing",
    "pipeline_bubble": "bubble",
    "tp": "tp traffic",
    "pp": "pp traffic",
    "cp": "cp traffic",
    "dp": "dp traffic",
    "ep": "all-to-all",
    "optimizer": "optimizer",
    "cores": "waiting for a core",
}


def describe(model: Architecture, cluster: Cluster, batch: int) -> str:
    """Model and cluster, in two lines."""
    kind = "dense"
    if model.moe_blocks:
        kind = f"{model.experts} experts, top {model.top_k}, in {model.moe_blocks} of {model.layers} blocks"
    return (
        f"{cluster.about}\n{model.parameters:,} parameters ({kind}), "
        f"{model.active_parameters:,} of them active for a token; {batch * model.seq:,} tokens a step"
    )


def why(plan: Estimate, best: Estimate) -> tuple[str, float]:
    """The part of a step by which a slower layout loses most, and the seconds it loses there."""
    losses = {name: getattr(plan.breakdown, part) - getattr(best.breakdown, part) for part, name in REASONS.items()}
    if plan.layout.recompute != best.layout.recompute and losses["computing"] > 0:
        losses[f"recompute {plan.layout.recompute}"] = losses.pop("computing")
    name = max(losses, key=lambda reason: losses[reason])
    return name, losses[name]


def table(plans: list[Estimate]) -> str:
    """Layouts, the first of which is the fastest, in markdown."""
    lines = [
        "| # | pp x tp x dp | ep x etp | b x m | v, schedule | recompute, zero | s a step | TFLOP/s | MFU | GB "
        "| loses by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for number, plan in enumerate(plans, 1):
        at, shown = plan.layout, plan.to_json()
        reason, seconds = why(plan, plans[0])
        loses = f"{seconds:+.3g} s {reason}" if number > 1 else ""
        lines.append(
            f"| {number} | {at.pp} x {at.tp} x {at.dp} | {at.ep} x {at.etp} | {at.micro_batch} x {at.micro_batches} "
            f"| {at.virtual}, {at.schedule if at.pp > 1 else '-'} | {at.recompute}, {at.data} | {plan.seconds:.3g} "
            f"| {shown['tflops_per_gpu']:.3g} | {plan.mfu:.1%} | {plan.memory.total / 1e9:.1f} | {loses} |"
        )
    return "\n".join(lines)


def lost(found: Found, cluster: Cluster, leaves_node: Estimate | None) -> list[str]:
    """Lines about layouts that are not in the table: slower ones, too large ones, and ones that cannot run."""
    best, lines = found.plans[0], []
    reasons = Counter(why(plan, best)[0] for plan in found.plans[1:])
    if reasons:
        listed = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
        lines.append(f"slower, by what they lose most: {listed}")
    if found.too_large is not None:
        at, held = found.too_large.layout, found.too_large.memory
        lines.append(
            f"do not fit into {cluster.device.memory_gb:g} GB: {found.does_not_fit}, the nearest pp {at.pp} x "
            f"tp {at.tp} x dp {at.dp}, micro-batch {at.micro_batch}, recompute {at.recompute}: "
            f"{held.total / 1e9:.1f} GB"
        )
    if leaves_node is not None:
        lines.append(
            f"tp leaves the node, at tp {leaves_node.layout.tp}: {leaves_node.seconds:.3g} s at best "
            f"({leaves_node.seconds / best.seconds - 1:+.0%})"
        )
    lines += [f"do not run: {number} times {reason}" for reason, number in found.refused.most_common(3)]
    return lines


def memory_table(plan: Estimate, cluster: Cluster) -> str:
    """Memory of the fullest rank by kind, in markdown."""
    kinds = plan.memory._asdict()
    rows = [f"| {kind} | {size / 1e9:.2f} |" for kind, size in kinds.items() if size]
    total = f"| all, of {cluster.device.memory_gb:g} | {plan.memory.total / 1e9:.2f} |"
    return "\n".join(["| memory of a rank | GB |", "|---|---|", *rows, total])


def time_table(plan: Estimate) -> str:
    """Seconds of a step by part, in markdown."""
    parts = plan.breakdown
    names = {**REASONS, "exposed": "of all traffic, not hidden"}
    rows = [f"| {name} | {getattr(parts, part):.4g} |" for part, name in names.items() if getattr(parts, part)]
    return "\n".join(["| part of a step | s |", "|---|---|", *rows, f"| the step | {plan.seconds:.4g} |"])


def node_order(plan: Estimate) -> list[str]:
    """Line with the nodes to start and their order; none if these are the first nodes in turn."""
    nodes = plan.placement.nodes(plan.layout) if plan.placement else []
    if nodes == list(range(len(nodes))):
        return []
    return [f"on these nodes, in the order of torchrun's --node-rank: {', '.join(map(str, nodes))}"]


def segments(model: Architecture, cluster: Cluster, plan: Estimate) -> list[str]:
    """Line about longer segments of full recomputation, if they would need less memory."""
    layout = plan.layout
    if layout.recompute != "full" or model.moe_blocks:
        return []
    sequences = layout.tp > 1 and "full" in cluster.software.sequence_parallel
    each = Activations(model, cluster, layout, sequences)
    blocks, flying = -(-model.layers // layout.pp), in_flight(layout)
    size = best_segment(blocks, each.kept(False), each.whole(False), flying)
    if size == 1:
        return []
    held = flying * -(-blocks // size) * each.kept(False) + size * each.whole(False)
    now = plan.memory.activations / 1e9
    return [f'recompute(model, "full", every={size}) would hold {held / 1e9:.1f} GB of activations, not {now:.1f}']


def warnings(model: Architecture, cluster: Cluster, plan: Estimate) -> list[str]:
    """Sentences about anything unusual in a layout."""
    at, per_node, found = plan.layout, cluster.ranks_per_node, []
    if not plan.fits:
        found.append(f"does not fit: {plan.memory.total / 1e9:.1f} GB a rank of {cluster.device.memory_gb:g}")
    if at.tp > per_node:
        found.append(f"tp ({at.tp}) leaves the node of {per_node} ranks: its exchanges go over the slow links")
    if model.moe_blocks and at.ep * at.etp > per_node:
        found.append(f"ep x etp ({at.ep * at.etp}) leaves the node of {per_node} ranks; transport {plan.transport}")
    if at.ranks > per_node and at.ranks % per_node:
        found.append(f"{at.ranks} ranks fill no whole number of nodes of {per_node}")
    if at.pp > 1 and at.zero > 1:
        found.append(f"in a pipeline {at.data} does as zero1")
    if at.schedule in ("interleaved_zb", "zbv") and at.recompute == "full" and at.pp > 1:
        found.append(f"{at.schedule} computes layers again in both halves of the backward; take another recompute")
    return found
