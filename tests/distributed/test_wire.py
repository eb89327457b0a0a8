"""Faults on the wire: sizes that disagree, ranks that die, cables that are pulled. An error on every rank, no hang."""

from __future__ import annotations

import os
import signal
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from emulate import Cluster, missing
from ranks import errors, outcomes
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import Dispatcher, Plan, all_to_all, check_sizes, exchange_sizes
from turnout.dispatch.flat import FlatDispatcher
from turnout.dispatch.hierarchical import HierarchicalDispatcher
from turnout.dispatch.node import NodeDispatcher

PATIENCE = 4  # seconds until gloo gives up
NAMES = pytest.mark.parametrize("name", ["flat", "2dh", "node"])


def disagree() -> None:
    send, recv = [1, 1, 1, 1], [1, 1, 1, 1 + (dist.get_rank() == 2)]
    check_sizes(send, recv, dist.group.WORLD)


def test_sizes_that_disagree():
    message = "DispatchError: rank 3 of the group sends 1 rows to rank 2, which expects 2 in recv; take recv from"
    for error in errors(4, disagree):
        assert error.startswith(message)


def agree() -> None:
    send = [dist.get_rank()] * 4
    check_sizes(send, exchange_sizes(torch.tensor(send), dist.group.WORLD).tolist(), dist.group.WORLD)


def test_sizes_that_agree():
    assert errors(4, agree) == [""] * 4


def absent(phase: str) -> None:
    """Rank 2 dies before the exchange."""
    everyone = dist.group.WORLD
    exchange_sizes(torch.ones(4), everyone)
    if dist.get_rank() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if phase == "sizes":
        exchange_sizes(torch.ones(4), everyone)
    all_to_all(torch.ones(4, 3), group=everyone)


@pytest.mark.parametrize("phase", ["sizes", "rows"])
def test_a_rank_that_is_dead(phase):
    found = [error or "" for _, error, _ in outcomes(4, absent, phase, patience=PATIENCE)]
    assert found[2] == "process died"
    for rank in (0, 1, 3):
        start = f"DispatchError: the exchange of {phase} among ranks [0, 1, 2, 3] failed on rank {rank}: "
        assert found[rank].startswith(start), found[rank]
        assert "no word from rank 2: dead" in found[rank]


def trips(name: str, tokens: int, doomed: int | None, number: int = 1000) -> None:
    """Trips, forward and backward, until one fails; the doomed rank is killed in the midst of one."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    for axis in ("node", "local"):
        mesh.get_group(axis).set_timeout(timedelta(seconds=PATIENCE))  # of its own: not that of the default group
    everyone = dist.group.WORLD
    assert everyone is not None
    dispatchers: dict[str, Dispatcher] = {
        "flat": FlatDispatcher(everyone),
        "2dh": HierarchicalDispatcher.of(mesh),
        "node": NodeDispatcher.of(mesh),
    }
    expert = torch.rand(tokens, 8, generator=torch.Generator().manual_seed(dist.get_rank())).topk(2).indices
    x, weight, plan = torch.randn(tokens, 64, requires_grad=True), torch.rand(tokens, 2), Plan.of(expert, 8)
    dist.barrier()
    if dist.get_rank() == doomed:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
    for _ in range(number):
        dispatchers[name](x, plan, weight, lambda rows, weight, counts: rows * weight.unsqueeze(1)).sum().backward()


@NAMES
def test_a_rank_that_dies_under_way(name):
    found = outcomes(4, trips, name, 4096, 3, patience=PATIENCE)
    assert found[3][1] == "process died"
    words = [str(error) for rank, (_, error, _) in enumerate(found) if rank != 3]
    assert all(text.startswith("DispatchError: the exchange of ") for text in words), words
    assert any("no word from rank 3: dead" in text for text in words), words


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing() or "-")
@NAMES
def test_a_cable_that_is_pulled(name):
    with Cluster(2, rate=1e8, delay=2e-4) as cluster:
        threading.Timer(3, cluster.set, ("link", 1, 0)).start()
        found = outcomes(4, trips, name, 4096, None, patience=PATIENCE, place=lambda rank: cluster.enter(rank, 2))
    words = [str(error) for _, error, _ in found]
    assert all(text.startswith("DispatchError: the exchange of ") for text in words), words


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing() or "-")
def test_a_cable_that_is_pulled_for_a_second():
    with Cluster(2, rate=1e8, delay=2e-4) as cluster:
        for after, up in ((2, 0), (3, 1)):
            threading.Timer(after, cluster.set, ("link", 1, up)).start()
        place = lambda rank: cluster.enter(rank, 2)  # noqa: E731
        found = outcomes(4, trips, "node", 1024, None, 60, place=place)
    assert [error for _, error, _ in found] == [None] * 4, found
