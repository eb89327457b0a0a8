"""Emulated cluster on one machine: network namespaces are its nodes, and a switch sets rate and delay of their links.

    python benchmarks/cluster/emulate.py --nodes 4 --ranks 2 --rate 100mbit --delay 0.2ms -- benchmarks/transports.py
    python benchmarks/cluster/emulate.py --nodes 2 --ranks 2 -- -m turnout.dispatch.autoselect.probe --nodes 2

The command after `--` runs on every rank as under torchrun, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and so on.
gloo uses the emulated links between nodes, and the loopback inside one. Ranks are forked from one process that has
imported torch, so 16 of them start in a second. If a rank fails, or on Ctrl-C, all are stopped. If this process is
killed, its ranks and its switch die with it, and the next start removes its nodes.

It needs Linux, root, `ip` of iproute2, /dev/net/tun, and a C compiler for switch.c.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing as mp
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

PREFIX = "turnout"  # a namespace is named turnout-PID-NODE, after the process that made it
NETWORK = "10.77.0"  # prefix of addresses, which exist inside the namespaces only
UNITS = {"": 1, "bit": 1, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "s": 1, "ms": 1e-3, "us": 1e-6}
CLONE_NEWNET, PR_SET_PDEATHSIG = 0x40000000, 1


def missing() -> str:
    """Reason why no cluster can be emulated here; "" if one can."""
    if not sys.platform.startswith("linux"):
        return "an emulated cluster needs Linux: its nodes are network namespaces"
    if os.geteuid() != 0:
        return "an emulated cluster needs root, for network namespaces and TUN devices"
    if not shutil.which("ip"):
        return "an emulated cluster needs `ip`: install iproute2"
    if not os.path.exists("/dev/net/tun"):
        return "an emulated cluster needs /dev/net/tun: load the kernel module tun"
    if not compiler():
        return "an emulated cluster needs a C compiler for its switch: install gcc, or set CC"
    return ""


def compiler() -> str | None:
    """Path of the C compiler: $CC, cc, gcc or clang; None if there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)


def number(text: str) -> float:
    """Parse a number with a unit: "100mbit" is 1e8, "0.2ms" is 2e-4, "none" is 0."""
    found = re.fullmatch(r"([0-9.]+)\s*([a-z]*)", text)
    if text == "none":
        return 0.0
    if not found or found[2] not in UNITS:
        units = ", ".join(filter(None, UNITS))
        raise argparse.ArgumentTypeError(f"{text!r} must be none, or a number with one of the units {units}")
    return float(found[1]) * UNITS[found[2]]


def leftovers() -> list[str]:
    """Names of nodes whose process has ended."""
    folder = Path("/run/netns")
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return [n for n in names if (m := re.fullmatch(PREFIX + r"-(\d+)-\d+", n)) and not Path("/proc", m[1]).exists()]


class Cluster:
    """Context manager of an emulated cluster; one at a time in a process.

    Args:
        nodes: number of nodes.
        rate: bit/s of each link in each direction; 0, the default, is unlimited.
        delay: seconds in one direction; 0 by default.
        frame: seconds that each frame occupies its sender's link, besides its bits; 0 by default.

    Raises:
        RuntimeError: the machine cannot emulate a cluster; the message says why.
    """

    def __init__(self, nodes: int, rate: float = 0.0, delay: float = 0.0, frame: float = 0.0) -> None:
        if reason := missing():
            raise RuntimeError(reason)
        self.names = [f"{PREFIX}-{os.getpid()}-{i}" for i in range(nodes)]
        self._links = {"rate": rate, "delay": delay, "frame": frame}
        self._folder = tempfile.TemporaryDirectory(prefix=f"{PREFIX}-")
        self._switch: subprocess.Popen | None = None

    def __enter__(self) -> Cluster:
        try:
            for name in leftovers():
                _remove(name)
            binary = os.path.join(self._folder.name, "switch")
            source = str(Path(__file__).parent / "switch.c")
            subprocess.run([str(compiler()), "-O2", "-o", binary, source, "-lm"], check=True)
            for name in self.names:
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            self._switch = subprocess.Popen(
                [binary, *self.names], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
            if self._ask() != "ready":
                raise RuntimeError("the switch did not start: see its message above")
            for i, name in enumerate(self.names):
                own = f"{NETWORK}.{i + 1}"
                _ip("-n", name, "addr", "add", f"{own}/24", "dev", "eth0")
                _ip("-n", name, "link", "set", "eth0", "up", "txqueuelen", "10000")
                # TCP sends a lost packet again after 10 ms, not 200, as the delay is small
                route = f"route change {NETWORK}.0/24 dev eth0 proto kernel scope link src {own} rto_min 10ms"
                _ip("-n", name, *route.split())
            for what, value in self._links.items():
                self.set(what, value)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._switch is not None:
            self._switch.kill()
            self._switch.communicate()
        for name in self.names:
            _remove(name)
        self._folder.cleanup()

    def set(self, *command: str | float) -> None:
        """Change the links at any time, as in ``set("rate", 1e8)`` or ``set("link", 1, 0)``. Commands: switch.c."""
        self._ask(" ".join(map(str, command)))

    def stats(self) -> dict[str, int]:
        """Numbers of frames: carried, dropped at full queues, and lost by the command `loss`."""
        return json.loads(self._ask("stats"))

    def enter(self, rank: int, ranks: int) -> None:
        """Move this process into its node as rank `rank`, where each node has `ranks` of them."""
        if self._switch is not None and self._switch.stdin is not None:
            os.close(self._switch.stdin.fileno())  # a forked copy would keep the switch alive
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with open(f"/run/netns/{self.names[rank // ranks]}") as node:
            if libc.setns(node.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        world = {"RANK": rank, "WORLD_SIZE": ranks * len(self.names), "GROUP_RANK": rank // ranks}
        local = {"LOCAL_RANK": rank % ranks, "LOCAL_WORLD_SIZE": ranks}
        master = {"MASTER_ADDR": f"{NETWORK}.1", "MASTER_PORT": 29500, "GLOO_SOCKET_IFNAME": "eth0"}
        os.environ.update({key: str(value) for key, value in {**world, **local, **master}.items()})

    def run(self, ranks: int, fn: Callable[[], None]) -> int:
        """Run fn() on `ranks` ranks of each node. Return 0, or the exit code of the first that fails; then all stop."""
        context = mp.get_context("fork")
        started = [
            context.Process(target=self._rank, args=(rank, ranks, fn), daemon=True)
            for rank in range(ranks * len(self.names))
        ]
        try:
            for process in started:
                process.start()
            alive = {process.sentinel: process for process in started}
            while alive:
                for sentinel in wait(list(alive)):
                    process = alive.pop(sentinel)
                    process.join()  # the pipe may close before the process has an exit code
                    if process.exitcode:
                        return process.exitcode
            return 0
        finally:
            for process in started:
                if process.pid is not None:
                    process.kill()
                    process.join()

    def _rank(self, rank: int, ranks: int, fn: Callable[[], None]) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C for all ranks
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.enter(rank, ranks)
        fn()

    def _ask(self, command: str | None = None) -> str:
        assert self._switch is not None
        assert self._switch.stdin is not None
        assert self._switch.stdout is not None
        if command is not None:
            self._switch.stdin.write(command + "\n")
            self._switch.stdin.flush()
        return self._switch.stdout.readline().strip()


def _ip(*arguments: str) -> None:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {result.stderr.strip()}")


def _remove(name: str) -> None:
    """Remove a node. It may be gone already: another cluster removes leftovers as well."""
    subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def script(command: list[str]) -> Callable[[], None]:
    """Function that runs ["file.py", arguments] or ["-m", "module", arguments] as a program."""

    def run() -> None:
        module = command[0] == "-m"
        sys.argv = command[1:] if module else command
        if module:
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(command[0]).resolve().parent))
            runpy.run_path(command[0], run_name="__main__")

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4, help="number of nodes")
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks in each node")
    parser.add_argument("--rate", type=number, default=0.0, help="rate of a link in each direction, such as 100mbit")
    parser.add_argument("--delay", type=number, default=0.0, help="delay in one direction, such as 0.2ms")
    parser.add_argument("--frame", type=number, default=0.0, help="extra time of each frame on its link, such as 1ms")
    parser.add_argument("command", nargs="+", help="after --: a script and its arguments, or -m and a module")
    args = parser.parse_args()
    if reason := missing():
        print(f"skipped: {reason}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the nodes are removed
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in background jobs
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else every rank warns that its address has no host name
    import torch.distributed  # noqa: F401 -- the ranks are forked with it

    try:
        with Cluster(args.nodes, args.rate, args.delay, args.frame) as cluster:
            return cluster.run(args.ranks, script(args.command))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
