"""Command line of the run report: python -m turnout.models.report RUN."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from . import LogError, write
from .log import path_of, read


def main(argv: list[str] | None = None) -> int:
    """Write the page, and return the exit status: 0, or 2 if it cannot be made."""
    parser = argparse.ArgumentParser(
        prog="python -m turnout.models.report", description="Write a report of a run as one HTML page."
    )
    parser.add_argument("run", type=Path, help="folder of a run, or its log.jsonl; report.html is written beside it")
    parser.add_argument(
        "--follow",
        type=int,
        metavar="SECONDS",
        help="seconds between two updates of the page, until the run ends; browsers reload it as often",
    )
    given = parser.parse_args(argv)
    run: Path = given.run
    follow: int | None = given.follow
    if follow is not None and follow < 1:
        parser.error(f"--follow must be 1 or more seconds; got {follow}")
    try:
        running = follow is not None and _running(run)  # before the page is made, so that it has the last line
        print(write(run, follow), flush=True)
        while follow is not None and running:
            time.sleep(follow)
            running = _running(run)
            write(run, follow)
    except (LogError, ModuleNotFoundError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # how --follow is ended
        pass
    return 0


def _running(run: Path) -> bool:
    return read(path_of(run)).state == "running"


if __name__ == "__main__":
    sys.exit(main())
