"""Errors of exchanges that fail: they name the layer, the forward, and where the other ranks are."""

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
from .place import LayerCall

GRACE = 1.0  # seconds that a failed rank waits for reports of the others


@contextmanager
def named(phase: str, group: ProcessGroup | None, call: LayerCall | None = None) -> Iterator[None]:
    """Turn a RuntimeError of a collective into a DispatchError that names the phase, the group and likely culprits.

    gloo names an address at best. It may be the address of a neighbour that gave up first, not of the rank that died.
    So each rank that fails writes where it is to the default group's store, and reads what the other ranks wrote.

    Args:
        phase: what is exchanged.
        group: the ranks; None is the default group.
        call: the forward that the exchange belongs to; None, the default, if it belongs to no single layer.

    Raises:
        DispatchError: in place of any RuntimeError except `torch.OutOfMemoryError`.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # no failure of the exchange
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        # Keep gloo's message alone, without its source line and its general advice.
        reason = re.sub(r"^\[[^\]]*\.cc:\d+\] ", "", str(error)).split(". This is typically")[0].strip()
        where = phase if call is None else f"{phase} in {call}"
        raise DispatchError(
            f"the exchange of {where} among ranks {ranks} failed on rank {dist.get_rank()}: {reason}; "
            + _other_ranks(where, ranks)
        ) from error


def timeout_of(group: ProcessGroup | None) -> timedelta:
    """Timeout of this group's collectives on CPU tensors."""
    return (group or dist.group.WORLD)._get_backend(torch.device("cpu")).options._timeout  # pyright: ignore


def _other_ranks(where: str, ranks: list[int]) -> str:
    """Where each of the other ranks reports a failure, and which of them do not report within a second."""
    others = [rank for rank in ranks if rank != dist.get_rank()]
    said: dict[int, str] = {}

    def listen() -> None:
        end = time.monotonic() + GRACE
        with suppress(Exception):  # the rank that hosts the store may have died
            store = dist.distributed_c10d._get_default_store()
            # Ranks fail together, so the n-th failures of all ranks belong together. Reports of older ones are ignored.
            number = store.add(f"turnout/failures/{dist.get_rank()}", 1)
            store.set(_key(dist.get_rank(), number), where)
            while len(said) < len(others) and time.monotonic() < end:
                new = [r for r in others if r not in said and store.check([_key(r, number)])]
                said.update({rank: store.get(_key(rank, number)).decode() for rank in new})
                time.sleep(GRACE / 20)

    thread = Thread(target=listen, daemon=True)  # a store that cannot be reached might never answer
    thread.start()
    thread.join(2 * GRACE)
    found = dict(said)
    elsewhere = [f"rank {rank} failed in {place}" for rank, place in sorted(found.items()) if place != where]
    silent = [rank for rank in others if rank not in found]
    if silent:
        elsewhere.append(f"no word from {told(silent)}: dead, cut off, or still waiting")
    return "; ".join(elsewhere) or "all of these ranks report a failure there"


def _key(rank: int, number: int) -> str:
    return f"turnout/failures/{rank}/{number}"
