"""python -m turnout.models.report RUN"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from . import LogError, write
from .log import read


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 2 if the page cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m turnout.models.report", description="A run as one HTML page.")
    parser.add_argument("run", type=Path, help="folder of a run, or its log.jsonl; report.html is written beside it")
    parser.add_argument(
        "--follow",
        type=int,
        metavar="SECONDS",
        help="make the page again so often until the run ends; it reloads itself",
    )
    job = parser.parse_args(argv)
    if job.follow is not None and job.follow < 1:
        parser.error(f"--follow must be 1 or more seconds; got {job.follow}")
    try:
        report = write(job.run, job.follow)
        print(report, flush=True)
        log = job.run / "log.jsonl" if job.run.is_dir() else job.run
        while job.follow and read(log).state == "running":
            time.sleep(job.follow)
            write(job.run, job.follow)
    except (LogError, ModuleNotFoundError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass  # of --follow
    return 0


if __name__ == "__main__":
    sys.exit(main())
