"""A run as one HTML page, made from its log: curves, load of the experts, restarts, settings.

On the command line: ``python -m turnout.models.report runs/pretrain``.
"""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from pathlib import Path

from .log import LogError, path_of, read

__all__ = ["LogError", "write"]


def write(run: str | Path, refresh: int | None = None) -> Path:
    """Make ``report.html`` from ``log.jsonl``, also while the run goes on; returns its path.

    The page is one file that asks for nothing else. It gets its name when it is complete, so a browser never sees half
    of it. Needs the package matplotlib (``turnout[train]``).

    Args:
        run: folder of a run, or its log; the page lies beside the log.
        refresh: seconds after which a browser loads the page again, as long as the run goes on; None: it does not.

    Raises:
        LogError: there is no log, it has no start line, or a line in its middle is broken.
        ModuleNotFoundError: matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError('the report needs matplotlib: pip install "turnout[train]"')
    from .page import page

    path = path_of(Path(run))
    html = page(read(path), time.time(), refresh)
    report = path.with_name("report.html")
    part = path.with_name(f".report.{os.getpid()}.html")
    try:
        part.write_text(html, encoding="utf-8", errors="replace")  # a log may hold half of a UTF-16 pair
        return part.replace(report)
    finally:
        part.unlink(missing_ok=True)
