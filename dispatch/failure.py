"""An exchange that fails on the wire: said in words, with the rank to look at."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from .agreement import DispatchError

GRACE = 1.0  # seconds a failed rank waits for word of the others


@contextmanager
def named(phase: str, group: ProcessGroup | None) -> Iterator[None]:
    """Turn a collective's RuntimeError into a DispatchError that tells the phase, the group and whom to suspect.

    gloo names an address at best, and the neighbour that gave up first as readily as the rank that died. So a rank
    that fails leaves a note in the default group's store, and names the ranks of which there is none.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # not the wire's fault
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        # Only gloo's own words: the place in its source before them and its advice behind them say nothing here.
        reason = re.sub(r"^\[[^\]]*\.cc:\d+\] ", "", str(error)).split(". This is typically")[0].strip()
        raise DispatchError(
            f"the exchange of {phase} among ranks {ranks} failed on rank {dist.get_rank()}: {reason}; {_census(ranks)}"
        ) from error


def _census(ranks: list[int]) -> str:
    """Who else of `ranks` says, within a second, that an exchange failed for them as well."""
    silent = [rank for rank in ranks if rank != dist.get_rank()]

    def listen() -> None:
        end = time.monotonic() + GRACE
        with suppress(Exception):  # the store's host may be what has died
            store = dist.distributed_c10d._get_default_store()
            store.set(_key(dist.get_rank()), "failed")
            while silent and time.monotonic() < end:
                silent[:] = [rank for rank in silent if not store.check([_key(rank)])]
                time.sleep(GRACE / 20)

    thread = Thread(target=listen, daemon=True)  # a store that is cut off might never answer
    thread.start()
    thread.join(2 * GRACE)
    if not silent:
        return "all of them report a failure"
    names = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
    return f"no word from {names}: dead, cut off, or still waiting"


def _key(rank: int) -> str:
    return f"turnout/failed/{rank}"
