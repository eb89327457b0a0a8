"""Groups of real gloo ranks for tests: forked, so that a group is up in a tenth of a second."""

from __future__ import annotations

import io
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist


def run(ranks: int, fn: Callable, *args: Any, timeout: float = 240) -> list[Any]:
    """fn(*args) on every rank of a new group -> what each returned; raises with the traceback of each that failed."""
    results = outcomes(ranks, fn, *args, timeout=timeout)
    failed = [f"rank {rank}:\n{text}" for rank, (_, error, text) in enumerate(results) if error is not None]
    assert not failed, "\n".join(failed)
    return [value for value, _, _ in results]


def errors(ranks: int, fn: Callable, *args: Any, timeout: float = 240) -> list[str]:
    """fn(*args) on every rank -> "TypeName: message" of what each raised, "" where it raised nothing."""
    return [error or "" for _, error, _ in outcomes(ranks, fn, *args, timeout=timeout)]


def outcomes(
    ranks: int,
    fn: Callable,
    *args: Any,
    timeout: float = 240,
    patience: float = 40,
    place: Callable[[int], None] | None = None,
) -> list[tuple[Any, str | None, str]]:
    """(value, error, traceback) of each rank. Ranks that hang are killed, and named.

    `patience`: seconds until gloo gives up. `place(rank)` is called first, to move a rank elsewhere.
    """
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_work, args=(rank, ranks, folder, theirs, fn, args, patience, place), daemon=True
            )
            process.start()
            theirs.close()
            started.append((process, ours))
        got: dict[int, tuple] = {}
        end = time.monotonic() + timeout
        while len(got) < ranks and time.monotonic() < end:
            waiting = {conn: rank for rank, (_, conn) in enumerate(started) if rank not in got}
            for conn in wait(list(waiting), timeout=end - time.monotonic()):
                try:
                    got[waiting[conn]] = torch.load(io.BytesIO(conn.recv_bytes()), weights_only=False)
                except EOFError:
                    got[waiting[conn]] = None, "process died", "it died without a word"
        hung = sorted(set(range(ranks)) - got.keys())
        for process, conn in started:
            if hung:
                process.kill()
            process.join(10)
            process.kill()
            conn.close()
    assert not hung, f"ranks {hung} hung for {timeout} s; the others: {got}"
    return [got[rank] for rank in range(ranks)]


def _work(rank: int, ranks: int, folder: str, conn, fn: Callable, args: tuple, patience: float, place) -> None:
    outcome: tuple[Any, str | None, str] = None, None, ""
    try:
        if place is not None:
            place(rank)
        store = dist.FileStore(os.path.join(folder, "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=patience))
        dist.barrier()  # a rank that fails and leaves at once would break off the others' connecting
        outcome = fn(*args), None, ""
        dist.barrier()
    except BaseException as error:
        outcome = None, f"{type(error).__name__}: {error}", traceback.format_exc()
    buffer = io.BytesIO()
    torch.save(outcome, buffer)
    conn.send_bytes(buffer.getvalue())
    conn.close()
    os._exit(0)  # nothing of the parent's is torn down here
