"""Does the planner predict this machine? It is fitted to three layouts of the main job, and compared on others.

    python benchmarks/planner.py --save runs.json  # starts examples/pretrain.py on 1 to 8 gloo ranks
    python benchmarks/planner.py --save runs.json  # compares once more: runs that the file has are not started again

One constant each is fitted to three runs: how fast a core computes, to one rank alone; what its links cost, to two
ranks of data parallelism; what DTensor adds to a collective, to tensor parallelism.
Memory of a process, and beside activations, is fitted to the first two. All else is `clusters/laptop.toml`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # the job, whose flags and layouts these are

import options
from options import Job
from planned import layout_of
from turnout.models.planner import Architecture, Cluster, Estimate, Estimator
from turnout.models.planner.volume import traffic

JOB = "--dim 256 --layers 4 --heads 4 --hidden 256 --experts 8 --seq 128 --batch 16 --eval-size 16 --eval-every 999"
LAYOUTS = [  # ranks, flags
    (1, "--ep 1"),
    (2, "--ep 1"),
    (2, "--ep 2"),
    (2, "--tp 2 --ep 1"),
    (2, "--pp 2 --ep 1 --micro-batches 4"),
    (2, "--ep 1 --data-parallel zero1"),
    (4, "--ep 4"),
    (4, "--pp 2 --ep 2 --micro-batches 4"),
    (4, "--tp 2 --ep 4"),
    (8, "--pp 2 --tp 2 --ep 4 --micro-batches 4"),
]
FITTED = (0, 1, 3)  # of these, to which constants are fitted


@dataclass(frozen=True)
class Run:
    """What a run of the job came to."""

    ranks: int
    flags: str
    seconds: float  # of a step
    memory: float  # bytes of the rank that has most
    sent: dict[str, float]  # bytes of a step by axis, the mean over ranks


def measure(ranks: int, flags: str, steps: int) -> Run:
    with tempfile.TemporaryDirectory() as out:
        job = [*JOB.split(), *flags.split(), "--steps", str(steps), "--log-every", str(steps // 2), "--out", out]
        script = Path(__file__).parents[1] / "examples" / "pretrain.py"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        done = subprocess.run(
            [*launch, str(script), *job],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        events = map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
        found = [event for event in events if event["event"] == "step"][-1]  # of the second half: the first warms up
    parsed = options.parse(job)
    sent: dict[str, float] = {}
    for key, size in found["sent_bytes"].items():
        axis, kind = key.split()
        if kind == "all_to_all":
            axis = "ep"
        elif "edp" in axis.split("=") and kind == "all_reduce":  # gradients of experts, along tp where dp is 1
            axis = "dp"
        axis = axis.split("=")[0].split("_")[0]
        sent[axis] = sent.get(axis, 0.0) + size
    seconds = parsed.batch * parsed.seq / found["tokens_per_s"]
    return Run(ranks, flags, seconds, found["memory_bytes"], sent)


def job_of(run: Run) -> Job:
    return options.parse([*JOB.split(), *run.flags.split()]).fit(run.ranks)


def estimate(cluster: Cluster, run: Run) -> Estimate:
    job = job_of(run)
    return Estimator(Architecture.of(job.config()), cluster, job.batch)(layout_of(job, run.ranks))


def fit(runs: list[Run], cores: int) -> Cluster:
    """The laptop's constants, with the speeds of core, links and wrappers and the memory of a process from the runs."""
    cluster = replace(Cluster.load("laptop"), cores=cores)

    def core(speed: float) -> Cluster:
        device = cluster.device
        rates = {name: speed * getattr(device, name) for name in ("half_tflops", "single_tflops", "memory_gbs")}
        return replace(cluster, device=replace(device, **rates))

    def links(speed: float) -> Cluster:
        before = cluster.inside
        times = {name: getattr(before, name) / speed for name in ("step_us", "message_us")}
        return replace(cluster, inside=replace(before, gbs=speed * before.gbs, **times))

    def wrappers(speed: float) -> Cluster:
        return replace(cluster, software=replace(cluster.software, wrapper_us=cluster.software.wrapper_us / speed))

    for run, changed in zip(FITTED, (core, links, wrappers), strict=True):
        cluster = changed(_root(lambda speed: estimate(changed(speed), runs[run]).seconds - runs[run].seconds))  # noqa: B023
    return _with_memory(cluster, runs[:2])


def _with_memory(cluster: Cluster, runs: list[Run]) -> Cluster:
    """What a process has beside tensors, and what it holds beside each byte of activations, from two runs."""
    software = replace(cluster.software, reserve_gb=0.0, fragmentation=0.0)
    bare = replace(cluster, software=software)
    held = [estimate(bare, run).memory for run in runs]
    kept = [memory.activations + memory.head for memory in held]
    rest = [run.memory - memory.total for run, memory in zip(runs, held, strict=True)]  # a x + b for a bytes kept
    slope = max(0.0, (rest[0] - rest[1]) / (kept[0] - kept[1]))
    reserve = max(0.0, rest[0] - slope * kept[0]) / 1e9
    return replace(cluster, software=replace(software, reserve_gb=reserve, fragmentation=slope))


def _root(excess: Callable[[float], float]) -> float:
    """Where a falling function of a speed is zero, by bisection of its logarithm; the nearest end if nowhere."""
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return (low * high) ** 0.5


def table(runs: list[Run], cluster: Cluster) -> str:
    lines = [
        "| ranks | flags | s a step | planned | | GB | planned | | MB sent, by axis | planned |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for number, run in enumerate(runs):
        job, plan = job_of(run), estimate(cluster, run)
        planned_step, held = plan.seconds, plan.memory.total
        sent = traffic(Architecture.of(job.config()), layout_of(job, run.ranks))
        fitted = " (fitted)" if number in FITTED else ""
        lines.append(
            f"| {run.ranks} | {run.flags}{fitted} | {run.seconds:.3f} | {planned_step:.3f} "
            f"| {planned_step / run.seconds - 1:+.0%} | {run.memory / 1e9:.3f} | {held / 1e9:.3f} "
            f"| {held / run.memory - 1:+.0%} | {_axes({a: run.sent.get(a, 0.0) for a in sent})} | {_axes(sent)} |"
        )
    return "\n".join(lines)


def _axes(sent: dict[str, float]) -> str:
    return ", ".join(f"{axis} {size / 1e6:.2f}" for axis, size in sent.items())


def runs_of(most: int, steps: int, file: Path | None) -> list[Run]:
    """Runs of all layouts of at most so many ranks, those that are in the file among them."""
    known = [Run(**run) for run in json.loads(file.read_text())] if file and file.exists() else []
    runs = []
    for ranks, flags in LAYOUTS:
        if ranks <= most:
            same = [run for run in known if (run.ranks, run.flags) == (ranks, flags)]
            runs += same or [measure(ranks, flags, steps)]
            if file:
                file.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8, help="leave out layouts of more")
    parser.add_argument("--steps", type=int, default=16, help="of each run; the second half is timed, less its last")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--save", type=Path, help="keep runs in this file, and start none that it has")
    args = parser.parse_args()
    runs = runs_of(args.ranks, args.steps, args.save)
    cluster = fit(runs, args.cores)
    device, inside = cluster.device, cluster.inside
    print(
        f"{args.cores} cores; fitted: {1e3 * device.single_tflops:.1f} GFLOP/s and {device.memory_gbs:.2f} GB/s a "
        f"core, {device.kernel_us:.1f} us a kernel; links {inside.gbs:.3f} GB/s, {inside.step_us:.0f} us a collective, "
        f"{cluster.software.wrapper_us:.0f} more by a wrapper; "
        f"{cluster.software.reserve_gb:.3f} GB a process, {cluster.software.fragmentation:.2f} beside activations\n"
    )
    print(table(runs, cluster))


if __name__ == "__main__":
    main()
