"""Measures what messages, bytes and products cost on a cluster; `turnout.dispatch.autoselect.probe` is the command."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..mesh import EP, axis, node_and_local
from .profile import Flop, Link, Profile

SMALL, LARGE = 64, 2**18  # bytes to each rank of a group


def measure(mesh: DeviceMesh, small: int = SMALL, large: int = LARGE, rounds: int = 5) -> Profile:
    """Measure links and products on a mesh with axes "node" and "local"; a collective, the same result on every rank.

    Four exchanges: small and large ones inside the nodes and between them, all groups at the same time as in a
    real trip, and a small one among all ranks. It differs from the small one between nodes in the number of messages
    alone, and so tells what a message costs and what an exchange costs by itself. Inside a node the two are not
    told apart: a message there bears both. Then a square matrix product on all ranks at the same time, in float32 and
    in bfloat16: what the experts' time is estimated by.

    Args:
        mesh: the one that `parallelize` gets.
        small, large: bytes to each rank.
        rounds: of which the fastest counts, after one that warms up: other work on the machine only adds.
    """
    node, local = node_and_local(mesh)
    ep = axis(mesh, EP)
    assert ep is not None
    everyone, device = ep.get_group(), torch.device(mesh.device_type)
    nodes, locals = dist.get_world_size(node), dist.get_world_size(local)
    seconds = [
        _seconds(group, size, everyone, rounds, device)
        for group, size in ((local, small), (local, large), (node, small), (node, large), (everyone, small))
    ]
    seconds += [_seconds_per_flop(dtype, everyone, rounds, device) for dtype in (torch.float32, torch.bfloat16)]
    times = torch.stack(seconds)
    dist.all_reduce(times, dist.ReduceOp.MAX, group=everyone)  # the slowest rank's, and the same numbers on all
    inside_small, inside_large, small_between, large_between, small_all, *flop = times.tolist()
    beside, away = max(locals - 1, 1), max(nodes - 1, 1)
    inside = Link(0.0, inside_small / beside, _per_byte(inside_large - inside_small, beside * (large - small)))
    more = (nodes - 1) * (locals - 1)  # messages between nodes that the exchange among all has and the other has not
    # 0 where more messages cost nothing; and all where they explain all
    message = min(max(0.0, small_all - small_between) / max(more, 1), small_between / away)
    step = small_between - away * message
    between = Link(step, message, _per_byte(large_between - small_between, away * (large - small)))
    return Profile(nodes, locals, inside, between, Flop(*flop))


def _per_byte(seconds: float, size: int) -> float:
    return max(seconds, 0.0) / size


def _seconds(group: ProcessGroup, size: int, everyone: ProcessGroup, rounds: int, device: torch.device) -> Tensor:
    """float64 []: an exchange with `size` bytes to each rank of `group`, in the fastest round."""
    ranks, times = dist.get_world_size(group), 5 if size < 2**12 else 1  # ranks do not leave a barrier all at once
    data = torch.zeros(ranks * size, dtype=torch.uint8, device=device)
    came, splits = torch.empty_like(data), [size] * ranks
    best = float("inf")
    for turn in range(rounds + 1):
        dist.barrier(everyone)
        start = time.perf_counter()
        for _ in range(times):
            dist.all_to_all_single(came, data, splits, splits, group=group)
        came[-1].item()  # waits for a device
        if turn:
            best = min(best, (time.perf_counter() - start) / times)
    return torch.tensor(best, dtype=torch.float64, device=device)


def _seconds_per_flop(dtype: torch.dtype, everyone: ProcessGroup, rounds: int, device: torch.device) -> Tensor:
    """float64 []: an operation of a matrix product while all ranks compute, in the fastest round."""
    side = 512 if device.type == "cpu" else 4096  # some milliseconds; on a GPU enough to fill it
    a = torch.full((side, side), 0.5, dtype=dtype, device=device)
    best = float("inf")
    for turn in range(rounds + 1):
        dist.barrier(everyone)
        start = time.perf_counter()
        product = a @ a
        product[-1, -1].item()  # waits for a device
        if turn:
            best = min(best, time.perf_counter() - start)
    return torch.tensor(best / (2 * side**3), dtype=torch.float64, device=device)
