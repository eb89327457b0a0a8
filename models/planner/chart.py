"""Pictures of a plan: where the time of a step goes, and the timeline of a schedule. matplotlib draws them."""

from __future__ import annotations

from pathlib import Path

from .breakdown import Estimate
from .simulator import Simulation
from .tables import REASONS

COLOURS = {"F": "#4878cf", "B": "#ee854a", "I": "#ee854a", "W": "#6acc65"}


def draw_steps(plans: list[Estimate], path: str | Path) -> None:
    """Draw a bar for each layout, stacked by the parts of a step. Only communication that nothing hides counts.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the extra "train" brings it.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.4 * len(plans)), layout="constrained")
    left = [0.0] * len(plans)
    labels = [
        f"{i}: pp{p.layout.pp} tp{p.layout.tp} dp{p.layout.dp} ep{p.layout.ep}, b{p.layout.micro_batch}"
        for i, p in enumerate(plans, 1)
    ]
    for part, name in REASONS.items():
        sizes = [_shown(plan, part) for plan in plans]
        axes.barh(labels, sizes, left=left, label=name)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a step")
    figure.legend(fontsize="small", loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _shown(plan: Estimate, part: str) -> float:
    """Seconds of a part. For an axis of communication, its share of what is exposed."""
    parts = plan.breakdown
    if part not in ("tp", "pp", "dp", "ep"):
        return getattr(parts, part)
    traffic = parts.tp + parts.pp + parts.dp + parts.ep
    return parts.exposed * getattr(parts, part) / traffic if traffic else 0.0


def draw_timeline(simulation: Simulation, path: str | Path, title: str = "") -> None:
    """Draw what each rank of a pipeline does over time. Raises ModuleNotFoundError as `draw_steps` does."""
    plt = _pyplot()
    ranks = 1 + max(span.rank for span in simulation.spans)
    figure, axes = plt.subplots(figsize=(12, 0.8 + 0.35 * ranks), layout="constrained")
    bars: dict[tuple[int, str, bool], list[tuple[float, float]]] = {}
    for span in simulation.spans:
        key = span.rank, span.kind, span.stage < ranks
        bars.setdefault(key, []).append((span.start, span.end - span.start))
    edge = {"edgecolor": "white", "linewidth": 0.3} if len(simulation.spans) <= 4000 else {}
    for (rank, kind, first), spans in bars.items():  # one call for many: a call for each takes minutes
        axes.broken_barh(spans, (rank - 0.4, 0.8), facecolors=COLOURS[kind], alpha=1.0 if first else 0.7, **edge)
    if len(simulation.spans) <= 400:
        for span in simulation.spans:
            middle = (span.start + span.end) / 2
            axes.text(middle, span.rank, str(span.micro_batch), ha="center", va="center", fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_ylabel("rank of the pipeline")
    axes.set_yticks(range(0, ranks, max(1, ranks // 16)))
    axes.set_title(f"{title} bubble {simulation.bubble:.1%}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _pyplot():
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt
