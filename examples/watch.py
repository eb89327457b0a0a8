"""Live table of the main job's MoE layers: which experts are loaded, and what their imbalance costs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

import launch
import torch.distributed as dist
from turnout.dispatch import Meshes
from turnout.moe import LayerReport

BARS = " ▁▂▃▄▅▆▇█"  # from no load to twice the mean and more
WIDTH = 64  # experts that a line shows


class Watch:
    """Prints a table on rank 0. On a terminal each table takes the place of the one before.

    Args:
        meshes: meshes of the job. Stages of a pipeline have layers of their own.
        out: stream to print on; stderr by default.
    """

    def __init__(self, meshes: Meshes, out: TextIO | None = None) -> None:
        self.stages, self.out = meshes.dense["pp"], out or sys.stderr
        self.lines = 0  # of the table that stands there

    def show(self, title: str, reports: Mapping[str, LayerReport]) -> None:
        """Print the reports of all stages. All ranks call it."""
        found: list[Any] = [reports]
        if self.stages.size() > 1:
            found = [None] * self.stages.size()
            dist.all_gather_object(found, dict(reports), group=self.stages.get_group())
        if launch.RANK:
            return
        lines = [title, *table({name: report for part in found for name, report in part.items()})]
        up = f"\033[{self.lines}A\033[J" if self.lines and self.out.isatty() else ""
        self.out.write(up + "\n".join(lines) + "\n")
        self.out.flush()
        self.lines = len(lines)


def table(reports: Mapping[str, LayerReport]) -> list[str]:
    """Lines of the table: for each layer the load of its experts, times in milliseconds, and what it does.

    The last line has the sums over layers, which is what imbalance costs in a step.
    """
    if not reports:
        return []
    name = max(len("layer"), *map(len, reports))
    bars = min(WIDTH, max(len(report.tokens_per_expert) for report in reports.values()))
    lines = [f"{'layer':{name}}  {'load':{bars}}  max/mean  imbalance ms  layer ms  does"]
    for layer, report in reports.items():
        loads = report.tokens_per_expert
        mean = sum(loads) / len(loads)
        bar = "".join(BARS[min(round(4 * n / mean), 8) if mean else 0] for n in loads[:WIDTH])
        uneven = max(loads) / mean if mean else 1.0
        lines.append(
            f"{layer:{name}}  {bar:{bars}}  {uneven:8.2f}  {report.imbalance:12.2f}  {report.measured:8.2f}  "
            f"{report.choice}"
        )
    lost, whole = (sum(getattr(r, field) for r in reports.values()) for field in ("imbalance", "measured"))
    lines.append(f"{'all layers':{name + bars + 2}}  {'':8}  {lost:12.2f}  {whole:8.2f}")
    return lines
