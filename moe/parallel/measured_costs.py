"""Measure a layer's costs: links of its mesh, copies, and its experts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from ...dispatch import mesh as axes
from ...dispatch.autoselect.measure import measure, measure_copy, measure_link
from ...dispatch.autoselect.profile import Link, Profile, Work
from ...dispatch.wire import row_bytes
from ..layer import MoE
from .costs import LayerCosts
from .named_dispatchers import auto_of, wire_of
from .weight_copies import with_copies

FREE = Link(0.0, 0.0, 0.0)
FEW, MOST, LONGEST = 8, 256, 1e9  # rows of an expert, and operations that a measurement may take
ROUNDS = 3  # of which the fastest counts, after a warm-up


def measured_costs(
    layers: dict[str, MoE], mesh: DeviceMesh | None, group: ProcessGroup | None
) -> dict[str, LayerCosts]:
    """Measure the costs of each layer, by name. Every rank of `group` must call it, and all get the same result.

    Args:
        layers: layers after `parallelize`.
        mesh: mesh of the experts, or None on one rank.
        group: ranks that have the layers, or None for this rank alone.
    """
    device = next(next(iter(layers.values())).parameters()).device
    ep, etp = (None if mesh is None else axes.axis(mesh, name) for name in (axes.EP, axes.ETP))
    links, slices, ways = Profile(1, 1, FREE, FREE), FREE, 1
    if mesh is not None and ep is not None and ep.size() > 1:
        known = [auto.profile for layer in layers.values() if (auto := auto_of(layer.dispatcher)) is not None]
        links = known[0] if known else measure(mesh)
    if etp is not None and etp.size() > 1:
        slices, ways = measure_link(etp.get_group(), device), etp.size()
    copy, works = measure_copy(device), {}
    for layer in layers.values():
        if layer.experts.row_flops not in works:
            works[layer.experts.row_flops] = expert_time(layer, links, device, group)
    sent: list[Any] = [(links, slices, copy, works)]
    if group is not None:
        dist.broadcast_object_list(sent, group=group, group_src=0)
    links, slices, copy, works = sent[0]
    found = {}
    for name, layer in layers.items():
        work, each = works[layer.experts.row_flops]
        learned = [p for p in layer.experts.parameters() if p.requires_grad]
        stored = [*layer.experts.parameters(), *layer.experts.buffers()]
        number = next(iter(learned or stored)).element_size()
        found[name] = LayerCosts(
            *(links, slices, ways, copy, work, each, layer.top_k, layer.num_experts),
            row_bytes=row_bytes(layer.dim, number, wire_of(layer.dispatcher)),
            expert_bytes=_bytes(stored) // layer.num_experts,
            learned_bytes=_bytes(learned) // layer.num_experts,
        )
    return found


def expert_time(layer: MoE, links: Profile, device: torch.device, group: ProcessGroup | None) -> tuple[Work, float]:
    """Seconds of a row in the forward, and seconds that an expert takes in forward and backward without rows.

    It times two experts of the same shapes with few rows and with many, on all ranks at once and on one rank alone.
    """
    experts = layer.experts
    params = [*experts.parameters()]
    if isinstance(experts, FSDPModule) or any(True for _ in experts.buffers()) or any(p.is_meta for p in params):
        dtype = next((p.dtype for p in params if p.is_floating_point()), torch.float32)
        rate = links.flop.float32 if dtype.itemsize > 2 else links.flop.bfloat16
        return Work(rate * experts.row_flops, rate * experts.row_flops), 0.0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        few, many = FEW, int(max(2 * FEW, min(MOST, LONGEST / (6 * experts.row_flops))))
        short, long = (_together(layer, rows, device, group) for rows in (few, many))
        alone = _alone(layer, many, device, group)
    row = max(long - short, 0.0) / (many - few) / 2  # two experts
    return Work(row / 3 * min(alone / long, 1.0), row / 3), max(short / 2 - few * row, 0.0)


def _together(layer: MoE, rows: int, device: torch.device, group: ProcessGroup | None) -> float:
    return min(_once(layer, rows, device, group) for _ in range(1 + ROUNDS))


def _alone(layer: MoE, rows: int, device: torch.device, group: ProcessGroup | None) -> float:
    """Seconds on the first rank of the group, while the others wait. Other ranks get infinity."""
    first, best = group is None or dist.get_rank(group) == 0, float("inf")
    for _ in range(1 + ROUNDS if first else 0):
        best = min(best, _once(layer, rows, device, None))
    if group is not None:
        dist.barrier(group)
    return best


def _once(layer: MoE, rows: int, device: torch.device, group: ProcessGroup | None) -> float:
    """Seconds of forward and backward of two experts with random weights."""
    copies = {
        name: torch.randn(2, *p.shape[1:], device=device, dtype=p.dtype).requires_grad_(p.requires_grad)
        for name, p in layer.experts.named_parameters()
    }
    compute, like = with_copies(layer.experts, lambda: copies), next(iter(copies.values()))
    x = torch.randn(2 * rows, layer.dim, device=device, dtype=like.dtype, requires_grad=True)
    weight = torch.ones(2 * rows, device=device, dtype=torch.promote_types(like.dtype, torch.float32))
    counts = torch.tensor([rows, rows], device=device)
    if group is not None:
        dist.barrier(group)
    start = time.perf_counter()
    with torch.enable_grad():
        y = compute(x, weight, counts)
        learned = [p for p in copies.values() if p.requires_grad]
        grads = torch.autograd.grad(y, [x, *learned], torch.ones_like(y), allow_unused=True)
    grads[0][-1, -1].item()  # wait for the device
    return time.perf_counter() - start


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
