"""The layout of a job from the model, the batch and the ranks that there are: ``parallel_model(layout="auto")``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ...dispatch.mesh import Meshes
from ..gpt import GPTConfig
from .architecture import Architecture
from .breakdown import Estimate
from .cluster import Cluster
from .search import search

DEVICES = {"H200": "h200", "H100": "h100", "B200": "gb200", "A100": "selene"}  # a part of a GPU's name: its preset


class Planned(NamedTuple):
    """The best layout: its meshes, further arguments of `parallel_model`, and its estimate."""

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
    """Search the best layout for all ranks of the default group, and make its meshes. Every rank must call it.

    Rank 0 searches and tells the others.

    Args:
        config: config of the whole model.
        batch: number of sequences in a step, on all ranks together.
        cluster: name of a preset, path of a file, or a `Cluster`. None, the default, takes the preset of this GPU, or
            "laptop" without a GPU, with the memory of this machine.
        ranks_per_node: number of ranks on each node (torchrun's LOCAL_WORLD_SIZE). None, the default, takes the
            cluster's.
        fixed: fields of a `Layout` that are given, and not searched. None by default.
        dtype: dtype in which the model computes: "bf16", "fp16" or "fp32" (the default).

    Raises:
        ValueError: no layout runs, or none fits into memory. Every rank raises.
    """
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = cluster if isinstance(cluster, Cluster) else Cluster.load(cluster) if cluster else here()
            found = runnable(replace(found, ranks_per_node=ranks_per_node or found.ranks_per_node))
            told = [search(Architecture.of(config), found, dist.get_world_size(), batch, fixed, dtype).plans[0]]
        except ValueError as error:
            told = [error]
    dist.broadcast_object_list(told)
    (plan,) = told
    if isinstance(plan, ValueError):
        raise plan
    at = plan.layout
    device = "cuda" if torch.cuda.is_available() else "cpu"
    meshes = Meshes.of(device, pp=at.pp, cp=at.cp, tp=at.tp, ep=at.ep, etp=at.etp, ranks_per_node=ranks_per_node)
    options = {
        "micro_batches": at.micro_batches,
        "schedule": at.schedule,
        "stages_per_rank": at.virtual if at.pp > 1 else None,
        "data": at.data,
        "recompute": at.recompute,
    }
    return Planned(meshes, options, plan)


def here() -> Cluster:
    """The preset that fits this machine's devices, with the memory that a device here has."""
    if not torch.cuda.is_available():
        cluster = Cluster.load("laptop")
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / cluster.ranks_per_node
    else:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        name = next((preset for part, preset in DEVICES.items() if part in properties.name), "h100")
        cluster, memory = Cluster.load(name), properties.total_memory
    return replace(cluster, device=replace(cluster.device, memory_gb=memory / 1e9))


def runnable(cluster: Cluster) -> Cluster:
    """The cluster without the schedules that this version of torch does not run, and that `Pipeline` refuses."""
    if torch.__version__ >= "2.13":
        return cluster
    schedules = tuple(name for name in cluster.software.schedules if name not in ("interleaved_zb", "zbv"))
    return replace(cluster, software=replace(cluster.software, schedules=schedules))
