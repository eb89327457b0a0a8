"""How a rank starts under torchrun, or alone, and how it is told to stop."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

# torchrun's variables, read here alone
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LAUNCHED = "WORLD_SIZE" in os.environ
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
NODES = int(os.environ.get("GROUP_WORLD_SIZE", 1))
RANKS_PER_NODE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def process_group(timeout: timedelta) -> Iterator[torch.device]:
    """The group of all ranks, and this rank's device. What waits longer than `timeout` for another rank raises."""
    if device := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if LAUNCHED:
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        if NODES == 1:  # a restarted rank must not find the addresses of the one before; for more nodes see docs
            store = dist.PrefixStore(f"start {RESTARTS}", store)
    else:
        store = dist.HashStore()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device else "gloo", store=store, rank=RANK, world_size=RANKS, timeout=timeout
    )
    try:
        yield torch.device("cuda", torch.cuda.current_device()) if device else torch.device("cpu")
    finally:
        dist.destroy_process_group()
        # A thread of gloo's that lets go of a tensor while the interpreter ends aborts the process ("terminate called
        # without an active exception", torch 2.13); it ends with its group. Meshes lie in cycles and hold groups.
        # (Those that DTensor's caches keep stay; they have this time to let go.)
        gc.collect()


class Stop:
    """Has any rank been told to stop (SIGTERM)? Asked when a step begins, answered when it ends, so that none waits."""

    def __init__(self) -> None:
        self._told = False
        signal.signal(signal.SIGTERM, self._tell)

    def _tell(self, *_: object) -> None:
        self._told = True

    def ask(self) -> None:
        self._flag = torch.tensor(int(self._told))
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, async_op=True)

    def answer(self) -> bool:
        self._work.wait()
        return bool(self._flag)


def restarted() -> bool:
    """Did torchrun start any rank again, after one of them ended?"""
    flag = torch.tensor(RESTARTS)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def say(text: str, every_rank: bool = False) -> None:
    """A line on standard error."""
    if every_rank or RANK == 0:
        print(f"rank {RANK}: {text}" if every_rank else text, file=sys.stderr, flush=True)
