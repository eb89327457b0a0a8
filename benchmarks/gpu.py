"""Is the layer correct on one GPU, how fast is each part, and how close is that to the limits of the GPU?

    python benchmarks/gpu.py --first                        # runs, right, how far from the floors? 90 seconds
    python benchmarks/gpu.py --out gpu.json                 # everything; 8 minutes
    python benchmarks/gpu.py --parts ops --seconds 1        # one part: machine, first, checks, ops, layer, tune
    python benchmarks/gpu.py --device cpu --small           # the same code on tiny shapes, to test that it runs

Nothing needs to be installed: with PyTorch, Triton, CuPy and einops on the machine, give Python the checkout under the
package's name. A wheel is a zip file, so a pure Python one (einops, Liger, ScatterMoE) can be unpacked into S.

    mkdir -p S; ln -sfn $PWD S/turnout; PYTHONPATH=S python benchmarks/gpu.py

It prints a table after each case, and at the end all targets with the results. --out writes both as JSON, after each
case, and the longest kernels of a step to a text file beside it. On a GPU each part runs in its own process. If a case
crashes or hangs, that is its result, and another process continues with the next case. Each part has a share of the
time that is left. Where the targets come from: docs/records/gpu.md, "Floors and targets". Other libraries are measured
if they are installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gpu_checks
import gpu_first
import gpu_layer
import gpu_ops
import gpu_tune
import torch
import turnout
from gpu_clock import Clock, fresh
from gpu_report import Row, judge, read, supervise, table, work, write

PARTS = {"machine": 1, "first": 4, "checks": 4, "ops": 3, "layer": 7, "tune": 6}  # part: its share of the time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--first", action="store_true", help="parts machine and first alone, within 90 seconds")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds to measure each set of runs")
    parser.add_argument("--limit", type=float, help="seconds for all parts together; 480 by default")
    parser.add_argument("--case-limit", type=float, default=120, help="seconds after which a case counts as hung")
    parser.add_argument("--out", type=Path, help="JSON file; the profile goes to the same name with .profile.txt")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # results file of the parent process
    args = parser.parse_args()
    if args.first:
        args.parts = ["machine", "first"]
    args.limit = args.limit or (90 if args.first else 480)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --small runs the same code on a CPU")
    if args.worker:
        file = args.worker
        return int(not all([work(file, part, cases(part, args), partial(fresh, device)) for part in args.parts]))

    deadline = time.monotonic() + args.limit
    with tempfile.TemporaryDirectory() as folder:
        file = args.out or Path(folder) / "results.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        for number, part in enumerate(args.parts):
            if device.type == "cpu":
                work(file, part, cases(part, args), partial(fresh, device))
            else:
                rest = [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in ("device", "seconds")]
                rest += ["--small"] * args.small + ([f"--out={args.out}"] if args.out else [])
                command = [sys.executable, __file__, *rest, f"--worker={file}", "--parts", part]
                now, shares = time.monotonic(), [PARTS[name] for name in args.parts[number:]]
                supervise(command, file, part, now + (deadline - now) * shares[0] / sum(shares), args.case_limit)
        results = read(file)
        if device.type == "cuda":
            results.setdefault("machine", {})["afterwards"] = {"rows": card()}
            print("\n## Afterwards\n\n" + table(card()))
            write(file, results)
    verdicts = list(judge(results))
    print("\n## Targets\n\n" + (table(verdicts) if verdicts else "No case has a target."))
    return int(any("error" in case for part in results.values() for case in part.values()))


def cases(part: str, args: argparse.Namespace) -> dict[str, Callable[[], list[Row]]]:
    device = torch.device(args.device)
    clock = Clock(device, args.seconds)
    if part == "machine":
        return {"machine": partial(machine, device)}
    if part == "first":
        return gpu_first.cases(clock, args.small)
    if part == "checks":
        return gpu_checks.cases(device, args.small)
    if part == "ops":
        return gpu_ops.cases(clock, args.small)
    if part == "tune":
        return gpu_tune.cases(clock, args.small)
    profile = args.out and args.out.with_suffix(".profile.txt")
    return gpu_layer.cases(clock, args.small, profile) | gpu_checks.slow_cases(device, args.small)


def machine(device: torch.device) -> list[Row]:
    facts: dict[str, object] = {"python": platform.python_version(), "platform": platform.platform()}
    facts["torch"] = torch.__version__  # has the build, which the package's metadata may lack
    for package in ("triton", "cupy-cuda13x", "cupy-cuda12x", "turnout"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts |= {"turnout is in": turnout.__path__[0], "CUDA of torch": torch.version.cuda}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts |= {"capability": f"{found.major}.{found.minor}", "multiprocessors": found.multi_processor_count}
        facts |= {"L2 MiB": found.L2_cache_size / 2**20, "memory GiB": found.total_memory / 2**30}
    return [{"fact": name, "value": str(value)} for name, value in facts.items()] + card()


def card() -> list[Row]:
    """State of the GPU as the driver reports it now; [] without a GPU."""
    asked = (
        "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,temperature.gpu,power.draw,power.limit"
    )
    try:
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    first = said.strip().splitlines()[0].split(", ")
    return [{"fact": name, "value": value} for name, value in zip(asked.split(","), first, strict=False)]


if __name__ == "__main__":
    sys.exit(main())
