"""An exchange that fails on the wire: said in words, with where each rank is."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Thread

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from .agreement import DispatchError, told
from .place import Visit

GRACE = 1.0  # seconds a failed rank waits for word of the others


@contextmanager
def named(phase: str, group: ProcessGroup | None, visit: Visit | None = None) -> Iterator[None]:
    """Turn a collective's RuntimeError into a DispatchError that tells the phase, the group and whom to suspect.

    gloo names an address at best, and the neighbour that gave up first as readily as the rank that died. So a rank
    that fails writes where it is into the default group's store, and reads what the others wrote there.

    Args:
        phase: what is exchanged.
        group: among which ranks.
        visit: in which forward of which layer; None if it belongs to no single layer.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # not the wire's fault
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        # Only gloo's own words: the place in its source before them and its advice behind them say nothing here.
        reason = re.sub(r"^\[[^\]]*\.cc:\d+\] ", "", str(error)).split(". This is typically")[0].strip()
        where = phase if visit is None else f"{phase} in {visit}"
        raise DispatchError(
            f"the exchange of {where} among ranks {ranks} failed on rank {dist.get_rank()}: {reason}; "
            + _census(where, ranks)
        ) from error


def timeout_of(group: ProcessGroup | None) -> timedelta:
    """How long a collective of this group waits on a CPU."""
    return (group or dist.group.WORLD)._get_backend(torch.device("cpu")).options._timeout  # pyright: ignore


def _census(where: str, ranks: list[int]) -> str:
    """Where the other `ranks` say, within a second, that an exchange failed for them."""
    others = [rank for rank in ranks if rank != dist.get_rank()]
    said: dict[int, str] = {}

    def listen() -> None:
        end = time.monotonic() + GRACE
        with suppress(Exception):  # the store's host may be what has died
            store = dist.distributed_c10d._get_default_store()
            # Ranks fail together, so this rank's n-th failure is the n-th of the others: older words are of older ones.
            number = store.add(f"turnout/failures/{dist.get_rank()}", 1)
            store.set(_key(dist.get_rank(), number), where)
            while len(said) < len(others) and time.monotonic() < end:
                told = [r for r in others if r not in said and store.check([_key(r, number)])]
                said.update({rank: store.get(_key(rank, number)).decode() for rank in told})
                time.sleep(GRACE / 20)

    thread = Thread(target=listen, daemon=True)  # a store that is cut off might never answer
    thread.start()
    thread.join(2 * GRACE)
    found = dict(said)
    elsewhere = [f"rank {rank} failed in {place}" for rank, place in sorted(found.items()) if place != where]
    silent = [rank for rank in others if rank not in found]
    if silent:
        elsewhere.append(f"no word from {told(silent)}: dead, cut off, or still waiting")
    return "; ".join(elsewhere) or "all of them report a failure there"


def _key(rank: int, number: int) -> str:
    return f"turnout/failures/{rank}/{number}"
