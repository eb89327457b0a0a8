"""The layout of a job from the model, the batch and the ranks that there are: ``parallel_model(layout="auto")``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ...dispatch.mesh import Meshes
from ..gpt import GPTConfig
from .architecture import Architecture
from .cluster import Cluster
from .estimate import Estimate
from .search import search


class Planned(NamedTuple):
    """Meshes, and further arguments of `parallel_model`."""

    meshes: Meshes
    options: dict[str, Any]
    plan: Estimate


def planned(
    config: GPTConfig,
    batch: int,
    cluster: Cluster | str | Path | None = None,
    ranks_per_node: int | None = None,
    fixed: Mapping[str, Any] | None = None,
    dtype: str = "fp32",
) -> Planned:
    """Meshes over all ranks of the default group in the best layout; every rank must call it.

    The search is the same on all ranks, so nothing is exchanged.

    Args:
        config: of the whole model.
        batch: sequences of a step, on all ranks together.
        cluster: a preset, a file or a `Cluster`; None: "h100" on GPUs and "laptop" without.
        ranks_per_node: torchrun's LOCAL_WORLD_SIZE; None: as the cluster has it.
        fixed: fields of a `Layout` that are not to be searched.
        dtype: "bf16", "fp16" or "fp32".

    Raises:
        ValueError: no layout runs, or none fits into memory.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = (
        cluster if isinstance(cluster, Cluster) else Cluster.load(cluster or ("h100" if device == "cuda" else "laptop"))
    )
    if ranks_per_node:
        found = replace(found, ranks_per_node=ranks_per_node)
    plan = search(Architecture.of(config), found, dist.get_world_size(), batch, fixed, dtype).plans[0]
    at = plan.layout
    meshes = Meshes.of(device, pp=at.pp, tp=at.tp, ep=at.ep, etp=at.etp, ranks_per_node=ranks_per_node)
    options = {
        "micro_batches": at.micro_batches,
        "schedule": at.schedule,
        "stages_per_rank": at.virtual if at.pp > 1 else None,
        "data": at.data,
        "recompute": at.recompute,
    }
    return Planned(meshes, options, plan)
