"""Does an MoE model learn better than a dense model of equal active FLOPs? The main job, with many settings.

    OMP_NUM_THREADS=1 python benchmarks/quality.py --workers 2

It makes all runs that are missing under --out, each in one process with one rank and one thread. Start it again to
continue. It prints the tables of docs/records/quality.md, which has the protocol. A run's folder is named by its flags.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET = (
    "--balance global --steps 1000 --batch 16 --seq 128 --warmup 50 --eval-every 250 --eval-size 512 --save-every 1000"
)
RATES = (1e-3, 2e-3, 4e-3)  # tried for both models with seed 0; the best one is used
SEEDS = (0, 1, 2)
MODELS = {"dense": "--dense", "MoE": ""}
LONGER = "--steps 4000 --eval-every 500"
LONG_MODELS = MODELS | {"MoE, aux 0.1": "--aux-weight 0.1"}  # the weight that was best in 1,000 steps
VARIANTS = {
    "topk, top-2 of 8, dropless, aux 0.01": "",
    "capacity 1.25": "--capacity-factor 1.25",
    "capacity 1.0": "--capacity-factor 1.0",
    "no balance loss": "--aux-weight 0",
    "aux 0.001": "--aux-weight 0.001",
    "aux 0.1": "--aux-weight 0.1",
    "gshard": "--gate gshard",
    "gshard, capacity 1.25": "--gate gshard --capacity-factor 1.25",
    "switch, 1 of 4 twice as wide": "--gate switch --top-k 1 --experts 4 --hidden 512",
    "switch, capacity 1.25": "--gate switch --top-k 1 --experts 4 --hidden 512 --capacity-factor 1.25",
    "finer: 4 of 16 half as wide": "--top-k 4 --experts 16 --hidden 128",
    "more: 2 of 32": "--experts 32",
    "noisy_topk": "--gate noisy_topk",
    "hash": "--gate hash",
    "random": "--gate random",
}


class Runs:
    """Results of runs by their flags. Missing runs are made."""

    def __init__(self, out: Path, workers: int, budget: str = BUDGET) -> None:
        self.out, self.pool, self.budget = out, ThreadPoolExecutor(workers), budget.split()

    def __call__(self, wanted: list[str]) -> dict[str, dict]:
        wanted = list(dict.fromkeys(wanted))
        return dict(zip(wanted, self.pool.map(self._run, wanted), strict=True))

    def _run(self, flags: str) -> dict:
        folder = folder_of(self.out, flags)
        result = folder / "result.json"
        if not result.exists():
            command = [sys.executable, "examples/pretrain.py", *self.budget, *flags.split(), "--out", str(folder)]
            print(f"# {' '.join(command[1:])}", file=sys.stderr, flush=True)
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            if done.returncode:
                raise RuntimeError(f"{flags}: {done.stderr[-2000:]}")
            result.write_text(done.stdout.splitlines()[-1])
        return json.loads(result.read_text())


def folder_of(out: Path, flags: str) -> Path:
    return out / flags.replace("--", "").replace(" ", "_")


def named(flags: str, lr: float, seed: int) -> str:
    return f"{flags.strip()} --lr {lr:g} --seed {seed}".strip()


def row(name: str, results: list[dict]) -> str:
    bits = [result["val_bpb"] for result in results]
    spread = f"{statistics.stdev(bits):.3f}" if len(bits) > 1 else "-"
    dropped, imbalance = (statistics.mean(result[key] for result in results) for key in ("dropped", "imbalance"))
    size = f"{results[0]['active_parameters']:,} | {results[0]['parameters']:,}"
    return (
        f"| {name} | {statistics.mean(bits):.3f} | {spread} | {len(bits)} | {dropped:.1%} | {imbalance:.2f} | {size} |"
    )


HEAD = """| {} | bits per byte | standard deviation | seeds | dropped | imbalance | active parameters | parameters |
|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--workers", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--variant-seeds", type=int, default=1, help="number of seeds of each routing variant")
    parser.add_argument("--long-seeds", type=int, nargs="*", default=[0], help="seeds of the runs of 4,000 steps")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="names of the routing variants to run")
    args = parser.parse_args()
    runs = Runs(args.out.resolve(), args.workers)

    tried = runs([named(flags, lr, 0) for lr in RATES for flags in MODELS.values()])
    print("| learning rate | " + " | ".join(MODELS) + " |\n|---|" + "---|" * len(MODELS))
    for lr in RATES:
        print(f"| {lr:g} | " + " | ".join(f"{tried[named(f, lr, 0)]['val_bpb']:.3f}" for f in MODELS.values()) + " |")
    best = {name: min(RATES, key=lambda lr: tried[named(f, lr, 0)]["val_bpb"]) for name, f in MODELS.items()}

    compared = {name: [named(f, best[name], seed) for seed in SEEDS] for name, f in MODELS.items()}
    results = runs([flags for group in compared.values() for flags in group])
    print("\n" + HEAD.format("model"))
    for name, group in compared.items():
        print(row(f"{name}, learning rate {best[name]:g}", [results[flags] for flags in group]), flush=True)

    longer = {
        name: [named(f"{f} {LONGER}", best[name.split(",")[0]], seed) for seed in args.long_seeds]
        for name, f in LONG_MODELS.items()
    }
    results = runs([flags for group in longer.values() for flags in group])
    print("\n" + HEAD.format("model, 4,000 steps"))
    for name, group in longer.items() if args.long_seeds else ():
        print(row(name, [results[flags] for flags in group]), flush=True)

    variants = {
        name: [named(VARIANTS[name], best["MoE"], seed) for seed in SEEDS[: args.variant_seeds]] for name in args.only
    }
    results = runs([flags for group in variants.values() for flags in group])
    print("\n" + HEAD.format("routing") if variants else "")
    for name, group in variants.items():
        print(row(name, [results[flags] for flags in group]))


if __name__ == "__main__":
    main()
