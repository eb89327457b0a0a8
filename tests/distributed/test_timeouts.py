"""How long a rank waits for one that never comes: what `parallelize` and `Meshes.of` were told."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from cases import build, tokens
from ranks import errors, outcomes, run
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import DispatchError, Meshes
from turnout.dispatch import mesh as axes
from turnout.moe import Balance, parallelize

SOON, LATE = 1.0, 30.0  # seconds


def waited(what) -> tuple[float, str]:
    """How long a call lasts until it fails, and with which error."""
    start = time.monotonic()
    try:
        what()
    except (RuntimeError, DispatchError) as error:
        return time.monotonic() - start, type(error).__name__
    return -1.0, "nothing"


def until_all_have(told: str) -> None:
    """Wait for the others by the store, which has timeouts of its own: a rank that leaves would break off others."""
    store = dist.distributed_c10d._get_default_store()
    store.add(told, 1)
    while store.add(told, 0) < dist.get_world_size():
        time.sleep(0.05)


def forward(timeout):
    """The last rank stays away from the layer's forward."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
    model = parallelize(build(balance=Balance(over="local", z_loss=1e-2)), mesh, timeout=timeout)
    found = waited(lambda: model(tokens(3))) if dist.get_rank() != 3 else (0.0, "")
    until_all_have("forward")
    return found


@pytest.mark.parametrize(("timeout", "patience"), [(SOON, LATE), (timedelta(seconds=SOON), LATE), (None, SOON)])
def test_a_forward_ends_when_time_is_up(timeout, patience):
    """None: the time that `init_process_group` was told."""
    found = [value for value, _, _ in outcomes(4, forward, timeout, patience=patience)]
    seconds, error = found[2]  # whose "ep" group it is
    assert error == "DispatchError"
    assert SOON * 0.8 < seconds < 4 * SOON + 2


def each(axis, operation, timeout):
    meshes = Meshes.of("cpu", pp=2, tp=2, timeout=timeout)
    axes.set_timeout(meshes)  # as parallelize does
    group, x, found = meshes.dense.get_group(axis), torch.ones(1 << 20), (0.0, "")
    if dist.get_rank(group) == 0:
        if operation == "recv":
            found = waited(lambda: dist.recv(x, group=group, group_src=1))
        elif operation == "irecv":
            found = waited(dist.irecv(x, group=group, group_src=1).wait)
        elif operation == "send":
            found = waited(lambda: dist.send(x, group=group, group_dst=1))
        elif operation == "all_reduce":
            found = waited(lambda: dist.all_reduce(x, group=group))
        else:
            found = waited(lambda: dist.all_to_all_single(torch.empty_like(x), x, group=group))
    until_all_have("each")
    return found


@pytest.mark.parametrize("operation", ["recv", "irecv", "send", "all_reduce", "all_to_all"])
@pytest.mark.parametrize(("axis", "timeout"), [("pp", SOON), ("tp", None)])
def test_sends_and_collectives_of_all_meshes(axis, operation, timeout):
    patience = LATE if timeout else SOON
    found = [value for value, _, _ in outcomes(4, each, axis, operation, timeout, patience=patience)]
    assert sorted(error for _, error in found) == ["", "", "RuntimeError", "RuntimeError"]
    for seconds, error in found:
        assert not error or SOON * 0.8 < seconds < 4 * SOON


def told(timeout):
    parallelize(build(), init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)), timeout=timeout)


def test_what_is_no_timeout_is_refused():
    for timeout, message in ((0, "ValueError: timeout must be positive; got 0"), ("1 h", "TypeError: timeout must be")):
        for error in errors(2, told, timeout):
            assert error.startswith(message)


def groups_of():
    """Groups that are made of several axes have the timeout as well."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("edp", "node", "local"))
    parallelize(build(), mesh, timeout=SOON)
    all_of = {
        axes.token_group(mesh),
        axes.axis(mesh, "ep").get_group(),
        *map(mesh.get_group, axes.names(mesh)),
    }
    return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in all_of}


def test_groups_of_several_axes():
    assert run(4, groups_of) == [{SOON}] * 4
