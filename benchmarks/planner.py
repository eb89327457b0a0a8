"""Does the planner predict this machine? It is fitted to two layouts of the main job, and compared on others.

    python benchmarks/planner.py --save runs.json          # starts examples/pretrain.py on 1 to 8 gloo ranks
    python benchmarks/planner.py --measured runs.json      # compares once more, without starting anything

One constant each is fitted to the first two runs: how fast a core computes, to one rank alone, and what its links
cost, to two ranks of data parallelism. So are the memory of a process without tensors, and what it holds beside each
byte of activations. All else is `clusters/laptop.toml`. Where there are more ranks than cores, a bubble costs nothing,
since another rank computes meanwhile: a step then takes the work of all ranks over the cores.
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
LAYOUTS = [  # ranks, flags; constants are fitted to the first two
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
        job = [*JOB.split(), *flags.split(), "--steps", str(steps), "--log-every", str(steps), "--out", out]
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
    found = json.loads(done.stdout.splitlines()[-1])
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


def step(cluster: Cluster, cores: int, run: Run) -> float:
    """Seconds of a step on so many cores."""
    plan = estimate(cluster, run)
    parts = plan.breakdown
    work = parts.compute + parts.optimizer + parts.tp + parts.pp + parts.dp + parts.ep
    return max(plan.seconds, run.ranks * work / cores)


def fit(runs: list[Run], cores: int) -> Cluster:
    """The laptop's constants, with the speed of a core and of its links from two runs, and the memory of a process."""
    base = Cluster.load("laptop")

    def core(speed: float) -> Cluster:
        device = base.device
        rates = {name: speed * getattr(device, name) for name in ("half_tflops", "single_tflops", "memory_gbs")}
        return replace(base, device=replace(device, **rates, kernel_us=device.kernel_us / speed))

    computing = core(_root(lambda speed: step(core(speed), cores, runs[0]) - runs[0].seconds))

    def links(speed: float) -> Cluster:
        inside = base.inside
        wire = replace(
            inside,
            gbs=speed * inside.gbs,
            step_us=inside.step_us / speed,
            message_us=inside.message_us / speed,
        )
        return replace(computing, inside=wire)

    linked = links(_root(lambda speed: step(links(speed), cores, runs[1]) - runs[1].seconds))
    return _with_memory(linked, runs[:2])


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


def table(runs: list[Run], cluster: Cluster, cores: int) -> str:
    lines = [
        "| ranks | flags | s a step | planned | | GB | planned | | MB sent, by axis | planned |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for number, run in enumerate(runs):
        job, planned_step = job_of(run), step(cluster, cores, run)
        held = estimate(cluster, run).memory.total
        sent = traffic(Architecture.of(job.config()), layout_of(job, run.ranks))
        fitted = " (fitted)" if number < 2 else ""
        lines.append(
            f"| {run.ranks} | {run.flags}{fitted} | {run.seconds:.3f} | {planned_step:.3f} "
            f"| {planned_step / run.seconds - 1:+.0%} | {run.memory / 1e9:.3f} | {held / 1e9:.3f} "
            f"| {held / run.memory - 1:+.0%} | {_axes({a: run.sent.get(a, 0.0) for a in sent})} | {_axes(sent)} |"
        )
    return "\n".join(lines)


def _axes(sent: dict[str, float]) -> str:
    return ", ".join(f"{axis} {size / 1e6:.2f}" for axis, size in sent.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8, help="leave out layouts of more")
    parser.add_argument("--steps", type=int, default=12, help="of each run; the last one is counted, not timed")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--measured", type=Path, help="runs that --save has written, in place of new ones")
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    if args.measured:
        runs = [Run(**run) for run in json.loads(args.measured.read_text())]
    else:
        runs = [measure(ranks, flags, args.steps) for ranks, flags in LAYOUTS if ranks <= args.ranks]
    if args.save:
        args.save.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    cluster = fit(runs, args.cores)
    device, inside = cluster.device, cluster.inside
    print(
        f"{args.cores} cores; fitted: {1e3 * device.single_tflops:.1f} GFLOP/s and {device.memory_gbs:.2f} GB/s a "
        f"core, {device.kernel_us:.1f} us a kernel; links {inside.gbs:.3f} GB/s, {inside.step_us:.0f} us a collective; "
        f"{cluster.software.reserve_gb:.3f} GB a process, {cluster.software.fragmentation:.2f} beside activations\n"
    )
    print(table(runs, cluster, args.cores))


if __name__ == "__main__":
    main()
