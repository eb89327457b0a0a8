"""The emulated cluster of benchmarks/cluster: its links do what they are told, and nothing of it is left behind."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import emulate
import pytest
import torch
import torch.distributed as dist
from emulate import Cluster, missing, number
from ranks import outcomes

ROOT = Path(__file__).resolve().parents[2]
NEEDS_ROOT = pytest.mark.skipif(bool(missing()), reason=missing() or "-")


def nodes(owner: int) -> list[str]:
    return [path.name for path in Path("/run/netns").glob(f"turnout-{owner}-*")]


def test_numbers_with_units():
    given = ["100mbit", "1gbit", "0.2ms", "5us", "2", "none"]
    assert [number(text) for text in given] == pytest.approx([1e8, 1e9, 2e-4, 5e-6, 2, 0])
    for text in ("fast", "1 furlong"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be none, or a number with one of the units bit"):
            number(text)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda patch: patch.setattr(os, "geteuid", lambda: 1000), "needs root"),
        (lambda patch: patch.setattr(sys, "platform", "darwin"), "needs Linux"),
    ],
)
def test_where_there_can_be_none_it_says_why(monkeypatch, change, says):
    change(monkeypatch)
    assert says in missing()
    with pytest.raises(RuntimeError, match=says):
        Cluster(2)


@NEEDS_ROOT
def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr(emulate, "compiler", lambda: None)
    assert "needs a C compiler for its switch: install gcc" in missing()


def exchange(size: int) -> float:
    """Seconds of an all-to-all of size bytes to each rank."""
    data = torch.zeros(size * dist.get_world_size(), dtype=torch.uint8)
    dist.barrier()
    start = time.monotonic()
    dist.all_to_all_single(torch.empty_like(data), data)
    return time.monotonic() - start


def measured(size: int, **links: float) -> float:
    with Cluster(2, **links) as cluster:
        found = outcomes(2, exchange, size, place=lambda rank: cluster.enter(rank, 1))
    assert nodes(os.getpid()) == []
    assert [error for _, error, _ in found] == [None, None]
    return max(seconds for seconds, _, _ in found)


@pytest.mark.slow
@NEEDS_ROOT
def test_links_are_as_slow_as_they_are_told():
    """Lower bounds, which no other work on the machine can break."""
    assert measured(2**20, rate=4e7) > 2**20 * 8 / 4e7
    assert measured(8, delay=0.05) > 0.05
    assert measured(8, frame=0.05) > 0.05


def started(script: Path) -> subprocess.Popen:
    """The command, with ranks that write their pids and wait."""
    script.write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "benchmarks/cluster/emulate.py", "--nodes", "2", "--ranks", "2", "--", str(script)]
    process = subprocess.Popen([*command, str(script.parent)], cwd=ROOT)
    until = time.monotonic() + 60
    while len([*script.parent.glob("[0-9]")]) < 4 and time.monotonic() < until:
        time.sleep(0.1)
    assert len(nodes(process.pid)) == 2
    return process


@pytest.mark.slow
@NEEDS_ROOT
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left(tmp_path, how):
    process = started(tmp_path / "script.py")
    pids = [int(path.read_text()) for path in tmp_path.glob("[0-9]")]
    process.send_signal(how)
    assert process.wait(20) != 0
    if how == signal.SIGKILL:
        with Cluster(1):
            pass  # the next one sweeps up
    assert nodes(process.pid) == []
    until = time.monotonic() + 10
    while any(Path("/proc", str(pid)).exists() for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert [pid for pid in pids if Path("/proc", str(pid)).exists()] == []


@pytest.mark.slow
@NEEDS_ROOT
def test_a_rank_that_fails_stops_all(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time\nsys.exit(3) if os.environ['RANK'] == '1' else time.sleep(600)\n")
    command = [sys.executable, "benchmarks/cluster/emulate.py", "--nodes", "2", "--ranks", "2", "--", str(script)]
    assert subprocess.run(command, cwd=ROOT, check=False, timeout=240).returncode == 3
