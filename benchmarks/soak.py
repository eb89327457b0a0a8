"""Does a job that is killed, stopped and hung many times end with the losses of an undisturbed job?

    python benchmarks/soak.py --mesh "" --mesh "--pp 2 --tp 2"        # 300 steps on 4 ranks, 50 signals each
    python benchmarks/soak.py --signals 0 --steps 1500 --mesh ""      # does memory grow?

`examples/pretrain.py` runs twice on 4 ranks: undisturbed, and with random signals. These are SIGKILL, SIGTERM, SIGSTOP
for ever, or SIGSTOP followed by SIGCONT after some seconds. They go to a random rank or to torchrun, at a random moment
while the job starts, trains, evaluates or saves. torchrun restarts its ranks if it can (--max-restarts). If torchrun
ends, a watchdog starts the job again with --resume, and kills processes that do not end. A shell script could do the
same. All training losses, and the held-out loss, must equal the undisturbed job's to the bit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from turnout.models.report.log import Log, read

ROOT = Path(__file__).parents[1]
# noise in the gate, so that random states matter; a short timeout, so that a hang is found soon
FLAGS = (
    "--batch 8 --seq 32 --dim 32 --heads 4 --layers 4 --hidden 32 --experts 4 --gate gshard --eval-size 8 "
    "--eval-every 20 --save-every 4 --log-every 1 --warmup 20 --timeout 8 --check-every 10"
)
PATIENCE = 600.0  # seconds without a new log line after which the soak fails
KINDS = ("KILL", "TERM", "STOP", "STOP+CONT")


class Sent(NamedTuple):
    """A signal, and the time until training continued."""

    kind: str
    to: str  # "rank" or "launcher"
    phase: str  # "training" or "starting"
    seconds: float  # time until training continued


class Job:
    """The job under torchrun, with its watchdog."""

    def __init__(self, out: Path, flags: list[str], ranks: int) -> None:
        self.out, self.flags, self.ranks, self.started = out, flags, ranks, 0
        self.said = (out.parent / f"{out.name}.said").open("a")
        self.start()

    def start(self) -> None:
        """Start the job, and resume from a checkpoint if there is one."""
        resume = ["--resume"] if list(self.out.glob("step-*")) else []
        launcher = ["--standalone", "--nproc-per-node", str(self.ranks), "--max-restarts", "3"]
        command = ["-m", "torch.distributed.run", *launcher, "examples/pretrain.py", "--out", str(self.out)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10"}
        self.process = subprocess.Popen(
            [sys.executable, *command, *self.flags, *resume], cwd=ROOT, env=env, stdout=self.said, stderr=self.said
        )
        self.started += 1

    def workers(self) -> list[int]:
        """Process ids of the ranks that are alive. torchrun has other children as well."""
        return [pid for pid in _children(self.process.pid) if _alive(pid) and b"pretrain.py" in _command(pid)]

    def log(self) -> Log | None:
        """Log of the job so far; None if there is none yet."""
        try:
            return read(self.out / "log.jsonl")
        except (OSError, ValueError):
            return None

    def done(self) -> bool:
        return (log := self.log()) is not None and log.state == "done"

    def tend(self) -> None:
        """Act as a watchdog: restart a job that has ended, and kill processes that cannot end."""
        if self.process.poll() is None:
            stopped = _state(self.process.pid) == "T"
            if stopped and all(_state(rank) == "T" for rank in self.workers()):  # a stopped torchrun cannot end the job
                self.process.kill()
            return
        ranks, end = _ranks_of(self.out), time.monotonic() + 30
        while any(map(_alive, ranks)) and time.monotonic() < end:
            if all(_state(pid) == "T" for pid in ranks if _alive(pid)):
                break  # stopped for ever: the SIGTERM at the end of their launcher does not reach them
            time.sleep(0.1)
        for pid in filter(_alive, ranks):
            os.kill(pid, signal.SIGKILL)
        if not self.done():
            self.start()

    def kill(self) -> None:
        for pid in [*self.workers(), self.process.pid]:
            if _alive(pid):
                os.kill(pid, signal.SIGKILL)

    def wait(self, until: Callable[[], bool], seconds: float) -> None:
        """Watch the job until a condition holds, or until the time is over."""
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            self.tend()
            time.sleep(0.05)

    def training(self) -> bool:
        """Whether there was a step since the last start."""
        log = self.log()
        return log is not None and log.end is None and log.steps != [] and log.steps[-1].time > log.starts[-1].time

    def starts(self) -> int:
        """Number of starts and restarts."""
        log = self.log()
        return len(log.starts) if log else 0

    def lines(self) -> int:
        """Number of lines in the log."""
        file = self.out / "log.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0


def disturb(job: Job, draw: random.Random) -> Sent | None:
    """Send one signal at a random moment, and wait until training continues. None if the job is done before."""
    before, further = job.lines(), draw.randint(1, 5)
    if not job.training() and draw.random() < 0.5:
        job.wait(job.training, draw.uniform(0, 8))
    else:
        job.wait(lambda: job.lines() >= before + further, PATIENCE)
        time.sleep(draw.uniform(0, 0.1))
    kind, to = draw.choice(KINDS), draw.choice(("rank", "rank", "launcher"))
    victims = job.workers() if to == "rank" else [job.process.pid]
    if job.done():
        return None
    if not victims:  # torchrun has not started them yet
        return disturb(job, draw)
    phase = "training" if job.training() else "starting"
    victim, at, starts, sent = draw.choice(victims), job.lines(), job.starts(), time.monotonic()
    first, _, then = kind.partition("+")
    heard = kind == "KILL" or _state(victim) != "T"  # a stopped process handles neither SIGTERM nor SIGSTOP
    if _alive(victim):
        os.kill(victim, getattr(signal, f"SIG{first}"))
    if then:
        job.wait(job.done, draw.uniform(0.5, 12 if to == "rank" else 2))
        if _alive(victim):
            os.kill(victim, getattr(signal, f"SIG{then}"))
    ends = heard and (kind in ("KILL", "TERM") or (kind == "STOP" and to == "rank"))
    job.wait(lambda: (job.starts() > starts if ends else job.lines() > at + 1) or job.done(), PATIENCE)
    if job.lines() == at or (ends and job.starts() == starts and not job.done()):
        raise SystemExit(f"{kind} to {to} {victim}: nothing happened for {PATIENCE:.0f} s; see {job.out}.said")
    return Sent(kind, to, phase, time.monotonic() - sent)


def run(out: Path, mesh: str, ranks: int, steps: int, signals: int, seed: int) -> tuple[Log, list[Sent], int, float]:
    """Run the whole job, and return its log, the signals, the number of starts by the watchdog, and seconds."""
    draw, sent, began = random.Random(seed), [], time.monotonic()
    job = Job(out, [*FLAGS.split(), "--steps", str(steps), *mesh.split()], ranks)
    try:
        while len(sent) < signals and (one := disturb(job, draw)):
            sent.append(one)
            print(
                f"  {len(sent)}. {one.kind} to {one.to}, {one.phase}: {one.seconds:.1f} s, {job.log().step} steps",
                flush=True,
            )
        job.wait(job.done, 1e9)
        return job.log(), sent, job.started, time.monotonic() - began
    finally:
        job.kill()


def report(mesh: str, alone: Log, log: Log, sent: list[Sent], started: int, seconds: list[float]) -> str:
    """Text of the results for one mesh."""
    losses, others = ({step.step: step.loss for step in each.steps} for each in (alone, log))
    held, theirs = ([(each.step, each.bits_per_byte) for each in run.held_out] for run in (alone, log))
    same = "the same to the bit" if (losses, held) == (others, theirs) else "DIFFERENT"
    memory = [step.memory_bytes / 2**20 for step in log.steps]
    early = memory[len(memory) // 5]
    lines = [
        f"mesh {mesh or 'of one axis'}: {len(others)} steps, curve {same}",
        f"{len(sent)} signals ({', '.join(f'{n} {kind}' for kind, n in Counter(each.kind for each in sent).items())}); "
        f"{len(log.restarts)} restarts, {started - 1} of them by the watchdog; "
        f"{sum(each.lost for each in log.restarts)} steps done again; {seconds[1]:.0f} s, alone {seconds[0]:.0f} s",
        f"memory of a rank after a fifth of the steps {early:.1f} MiB, at the end {memory[-1]:.1f} MiB",
    ]
    for kind in KINDS:
        if took := [each.seconds for each in sent if each.kind == kind]:
            lines.append(f"{kind}: training again after {statistics.median(took):.1f} s, at most {max(took):.1f} s")
    return "\n".join(lines)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _state(pid: int) -> str:
    """State of a process, such as R, S, T (stopped) or Z (ended); "" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _alive(pid: int) -> bool:
    return _state(pid) not in ("", "Z")


def _ranks_of(out: Path) -> list[int]:
    """Process ids of a job's ranks, found by command line, since orphans have another parent."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    named = [(pid, _command(pid)) for pid in pids]
    return [pid for pid, line in named if str(out).encode() in line and b"distributed.run" not in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", action="append", help='flags of a mesh, such as "--pp 2 --tp 2"; may be repeated')
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--signals", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for mesh in args.mesh or [""]:
        with tempfile.TemporaryDirectory() as folder:
            alone, _, _, calm = run(Path(folder, "alone"), mesh, args.ranks, args.steps, 0, args.seed)
            log, sent, started, stormy = alone, [], 1, calm
            if args.signals:
                log, sent, started, stormy = run(
                    Path(folder, "disturbed"), mesh, args.ranks, args.steps, args.signals, args.seed
                )
            print(report(mesh, alone, log, sent, started, [calm, stormy]), flush=True)


if __name__ == "__main__":
    main()
