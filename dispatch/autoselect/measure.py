"""Measurement of what messages, bytes and matrix products cost on a cluster. The command is `probe.py`."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..mesh import EP, NODE, axis, names, node_and_local
from .profile import Flop, Link, Profile

SMALL, LARGE = 64, 2**18  # bytes that a rank sends to each rank of a group


def measure(mesh: DeviceMesh, small: int = SMALL, large: int = LARGE, rounds: int = 5) -> Profile:
    """Measure the costs of links and matrix products. Every rank must call it, and every rank gets the same result.

    It times five exchanges: small and large ones inside nodes, small and large ones between nodes, and a small one
    among all ranks. All groups exchange at the same time, as in a real dispatch. The last exchange differs from the
    small one between nodes only in its number of messages. So the two give the cost of a message and of an exchange.
    Inside a node these are not separated, and a message has both costs.

    It then times a square matrix product on all ranks at the same time, in float32 and bfloat16, to estimate the
    experts.

    Args:
        mesh: mesh with axes "node" and "local", as given to `parallelize`. On a mesh with "ep" each rank counts as a
            node.
        small: bytes to each rank in small exchanges, 64 by default.
        large: bytes to each rank in large exchanges, 2^18 by default.
        rounds: number of rounds after one warm-up, 5 by default. The fastest counts, because other work on the machine
            can only add time.
    """
    ep = axis(mesh, EP)
    assert ep is not None
    everyone, device = ep.get_group(), torch.device(mesh.device_type)
    node, local = (everyone, None) if NODE not in names(mesh) else node_and_local(mesh)
    nodes, locals = dist.get_world_size(node), 1 if local is None else dist.get_world_size(local)
    seconds = [
        _seconds(group, size, everyone, rounds, device)
        for group, size in ((local, small), (local, large), (node, small), (node, large), (everyone, small))
    ]
    seconds += [_seconds_per_flop(dtype, everyone, rounds, device) for dtype in (torch.float32, torch.bfloat16)]
    times = torch.stack(seconds)
    dist.all_reduce(times, dist.ReduceOp.MAX, group=everyone)  # times of the slowest rank, equal on all ranks
    inside_small, inside_large, small_between, large_between, small_all, *flop = times.tolist()
    beside, away = max(locals - 1, 1), max(nodes - 1, 1)
    inside = Link(0.0, inside_small / beside, _per_byte(inside_large - inside_small, beside * (large - small)))
    more = (nodes - 1) * (locals - 1)  # messages between nodes that only the exchange among all ranks has
    # At least 0, and at most the whole small exchange, whatever the noise.
    message = min(max(0.0, small_all - small_between) / max(more, 1), small_between / away)
    step = small_between - away * message
    between = Link(step, message, _per_byte(large_between - small_between, away * (large - small)))
    return Profile(nodes, locals, inside, between, Flop(*flop))


def _per_byte(seconds: float, size: int) -> float:
    return max(seconds, 0.0) / size


def measure_link(group: ProcessGroup, device: torch.device, rounds: int = 5) -> Link:
    """Measure the cost of exchanges in one group, as `measure` does. The result is of this rank."""
    small, large = (float(_seconds(group, size, group, rounds, device)) for size in (SMALL, LARGE))
    others = max(dist.get_world_size(group) - 1, 1)
    return Link(0.0, small / others, _per_byte(large - small, others * (LARGE - SMALL)))


def measure_copy(device: torch.device, rounds: int = 5) -> float:
    """Seconds of one byte that this rank copies in rows, as dispatch and combine do."""
    rows = torch.zeros(4096, 64, device=device)
    order, best = torch.arange(len(rows) - 1, -1, -1, device=device), float("inf")
    for turn in range(rounds + 1):
        start = time.perf_counter()
        rows.index_select(0, order)[-1, -1].item()  # wait for the device
        if turn:
            best = min(best, time.perf_counter() - start)
    return best / (rows.numel() * rows.element_size())


def _seconds(
    group: ProcessGroup | None, size: int, everyone: ProcessGroup, rounds: int, device: torch.device
) -> Tensor:
    """Time of an exchange with `size` bytes to each rank of `group`, in the fastest round: float64 []."""
    if group is None:
        return torch.zeros((), dtype=torch.float64, device=device)
    ranks, times = dist.get_world_size(group), 5 if size < 2**12 else 1  # because ranks leave a barrier at odd times
    data = torch.zeros(ranks * size, dtype=torch.uint8, device=device)
    came, splits = torch.empty_like(data), [size] * ranks
    best = float("inf")
    for turn in range(rounds + 1):
        dist.barrier(everyone)
        start = time.perf_counter()
        for _ in range(times):
            dist.all_to_all_single(came, data, splits, splits, group=group)
        came[-1].item()  # wait for the device
        if turn:
            best = min(best, (time.perf_counter() - start) / times)
    return torch.tensor(best, dtype=torch.float64, device=device)


def _seconds_per_flop(dtype: torch.dtype, everyone: ProcessGroup, rounds: int, device: torch.device) -> Tensor:
    """Time of one operation of a matrix product while all ranks compute, in the fastest round: float64 []."""
    side = 512 if device.type == "cpu" else 4096  # some milliseconds on a CPU; large enough to fill a GPU
    a = torch.full((side, side), 0.5, dtype=dtype, device=device)
    best = float("inf")
    for turn in range(rounds + 1):
        dist.barrier(everyone)
        start = time.perf_counter()
        product = a @ a
        product[-1, -1].item()  # wait for the device
        if turn:
            best = min(best, time.perf_counter() - start)
    return torch.tensor(best / (2 * side**3), dtype=torch.float64, device=device)
