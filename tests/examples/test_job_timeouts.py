"""The job's timeout is that of each group it makes, whichever axis or library made it."""

from __future__ import annotations

import launch
import matplotlib.pyplot  # noqa: F401  forked ranks need not import it
import options
import pretrain
import pytest
import torch
import torch.distributed as dist
from main_job import TEXT, TINY
from ranks import outcomes

MESHES = [
    ("--pp 2 --tp 2 --layers 4 --schedule interleaved1f1b", 1),
    ("--tp 2 --ep 2 --data-parallel fsdp --bf16", 1),
    ("--ep 2 --etp 2", 1),
    ("--ep 4", 2),
    ("--pp 2 --dense --data-parallel zero1", 1),
]


def timeouts(out: str, flags: str, nodes: int) -> dict[str, float]:
    """Of all groups after a job of two steps, in seconds."""
    launch.RANK, launch.RANKS = dist.get_rank(), dist.get_world_size()
    launch.NODES, launch.RANKS_PER_NODE = nodes, launch.RANKS // nodes
    given = [*TINY.split(), "--steps", "2", "--eval-size", "8", "--batch", "8", "--timeout", "27"]
    job = options.parse([*given, "--out", out, "--data", TEXT, *flags.split()]).fit(launch.RANKS)
    pretrain.train(job, torch.device("cpu"), launch.Place())
    groups = dist.distributed_c10d._world.pg_names
    return {
        f"{name} {dist.get_process_group_ranks(group)}": group._get_backend(
            torch.device("cpu")
        ).options._timeout.total_seconds()
        for group, name in groups.items()
        if isinstance(group, dist.ProcessGroup)
    }


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize(("flags", "nodes"), MESHES)
def test_every_group_has_it(tmp_path, flags, nodes):
    for found, error, trace in outcomes(4, timeouts, str(tmp_path), flags, nodes, patience=27):
        assert error is None, trace
        assert len(found) > 4
        assert set(found.values()) == {27}, found
