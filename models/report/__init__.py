"""Run report: one HTML page from a run's log, with curves, expert load, restarts and settings.

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
    """Write ``report.html`` from a run's ``log.jsonl``, during the run or after it.

    The page is a single file that loads nothing else. It replaces an older one at once, so a browser never sees half of
    it. Needs the package matplotlib (``turnout[train]``).

    Args:
        run: path of the run's folder, or of its log. The page is written beside the log.
        refresh: seconds after which a browser reloads the page, while the run goes on. None, the default, never.

    Returns:
        Path of the page.

    Raises:
        LogError: the log is missing, has no start line, or has a broken line that no crash explains.
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
