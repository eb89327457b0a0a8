"""How many steps does a mixture need for the loss that its dense twin of equal active FLOPs has after 2,000?

    OMP_NUM_THREADS=1 python benchmarks/steps_saved.py --workers 2

Each run is the main job with `examples/configs/quick.toml` and the flags here, in one process with one thread. Runs
that are in --out are not made again. The protocol and all results are in docs/records/quality.md.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from quality import ROOT, Runs

BUDGET = (
    "--config examples/configs/quick.toml --lr 0.016 --balance global --eval-every 500 --eval-size 512 "
    "--save-every 100000"
)
COMPARED = {
    "dense, 2,000 steps": "--dense --steps 2000",
    "mixture, 1,000 steps": "--steps 1000",
    "dense, 2,000 steps, lr 0.008": "--dense --steps 2000 --lr 0.008",
    "dense, 2,000 steps, lr 0.03": "--dense --steps 2000 --lr 0.03",
    "mixture, 1,000 steps, lr 0.008": "--steps 1000 --lr 0.008",
    "mixture, 1,000 steps, lr 0.03": "--steps 1000 --lr 0.03",
    "dense, 2,000 steps, AdamW": "--dense --steps 2000 --optimizer adamw --lr 0.004",
    "mixture, 1,000 steps, AdamW": "--steps 1000 --optimizer adamw --lr 0.004",
}
SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "steps_saved")
    parser.add_argument("--workers", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", nargs="+", default=list(COMPARED), choices=COMPARED, help="rows of the table")
    args = parser.parse_args()
    out = args.out.resolve()
    flags = {name: [f"{COMPARED[name]} --seed {seed}" for seed in args.seeds] for name in args.only}
    results = Runs(out, args.workers, BUDGET)([run for runs in flags.values() for run in runs])
    print("| model | bits per byte | seeds | imbalance | active parameters | parameters |")
    print("|---|---|---|---|---|---|")
    for name, runs in flags.items():
        found = [results[run] for run in runs]
        bits = [result["val_bpb"] for result in found]
        imbalance = statistics.mean(result["imbalance"] for result in found)
        print(
            f"| {name} | {statistics.mean(bits):.3f} | {', '.join(f'{b:.3f}' for b in bits)} | {imbalance:.2f} | "
            f"{found[0]['active_parameters']:,} | {found[0]['parameters']:,} |"
        )


if __name__ == "__main__":
    main()
