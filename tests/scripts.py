"""Scripts run as torchrun starts them, but on forked ranks: importing torch anew takes seconds a rank.

What concerns the launcher itself (signals, restarts) is tested with torchrun.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing as mp
import os
import runpy
import socket
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess

import torch


class Done(CompletedProcess):
    """A finished script.

    Attributes:
        codes: the exit status of each rank; None: it was ended after another one had failed.
    """

    codes: list[int | None]


def script(path: Path, *argv: str, ranks: int = 1, alone: bool = False, timeout: float = 240) -> Done:
    """What `torchrun --nproc-per-node ranks path argv...` prints, and how it ends; `alone`: `python path argv...`.

    The status is that of the first rank to fail; the others are ended then, as by torchrun.
    """
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        out, err = Path(folder, "out"), Path(folder, "err")
        started = []
        for rank in range(ranks):
            env = {} if alone else _torchrun(rank, ranks, port)
            started.append(context.Process(target=_run, args=(path, argv, env, out, err), daemon=True))
            started[-1].start()
        code, end = 0, time.monotonic() + timeout
        running = {process.sentinel: process for process in started}
        while running and (left := end - time.monotonic()) > 0:
            for ended in wait(list(running), left):
                process = running.pop(ended)
                process.join()
                if process.exitcode and not code:
                    code, end = process.exitcode, min(end, time.monotonic() + 5)  # the others may wait for it
        codes = [None if process in running.values() else process.exitcode for process in started]
        hung = [rank for rank, process in enumerate(started) if process in running.values()]
        for process in running.values():
            process.kill()
            process.join()
        done = Done([str(path), *argv], code, out.read_text(), err.read_text())
    done.codes = codes
    assert code or not hung, f"ranks {hung} hung for {timeout} s: {done.stderr}"
    return done


def _torchrun(rank: int, ranks: int, port: int) -> dict[str, str]:
    sizes = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_WORLD_SIZE": 1, "TORCHELASTIC_RESTART_COUNT": 0}
    places = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return {name: str(value) for name, value in (sizes | places).items()}


def _run(path: Path, argv: tuple[str, ...], env: dict[str, str], out: Path, err: Path) -> None:
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.update(env)
    # As a fresh interpreter: nothing of pytest, no module of the script's folder, the seed it starts with.
    warnings.resetwarnings()
    logging.getLogger().handlers.clear()
    for name, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) and Path(module.__file__).parent == path.parent:
            del sys.modules[name]
    torch.manual_seed(0)
    sys.argv, sys.path[0:0] = [str(path), *argv], [str(path.parent)]
    try:
        runpy.run_path(str(path), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
