"""How many steps does a mixture need for the loss that its dense twin of equal active FLOPs has after 2,000?

    OMP_NUM_THREADS=1 python benchmarks/steps_saved.py --workers 2
    OMP_NUM_THREADS=1 python benchmarks/steps_saved.py --workers 2 --search   # the runs that the mixture was chosen by
    OMP_NUM_THREADS=1 python benchmarks/steps_saved.py --time                 # of a step, on an idle machine

Each run is the main job with `examples/configs/quick.toml` and the flags here, in one process with one thread. Runs
that are in --out are not made again. The protocol and all results are in docs/records/quality.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from quality import ROOT, Runs, folder_of

JOB = "--config examples/configs/quick.toml --balance global --eval-every 500 --eval-size 512 --save-every 100000"
MIXTURE = "--batch 64 --moe-every 2 --experts 64 --steps 1000"
DENSE = "--batch 64 --dense --steps 2000"
COMPARED = {
    "dense, 2,000 steps": f"{DENSE} --lr 0.016",
    "mixture, 1,000 steps": f"{MIXTURE} --lr 0.016",
    "mixture, 1,000 steps, lr 0.008": f"{MIXTURE} --lr 0.008",
    "mixture, 750 steps, lr 0.008": f"{MIXTURE} --lr 0.008 --steps 750",
    "mixture, 700 steps, lr 0.008": f"{MIXTURE} --lr 0.008 --steps 700",
    "dense, 2,000 steps, lr 0.008": f"{DENSE} --lr 0.008",
}
SEARCHED = {
    "every block, 32 experts": "--moe-every 1 --experts 32",
    "blocks 2 and 4, 32 experts": "--moe-every 2 --experts 32",
    "blocks 2 and 4, 64 experts": "--moe-every 2 --experts 64",
    "64 experts, lr 0.012": "--moe-every 2 --experts 64 --lr 0.012",
    "64 experts, balance loss 0.003": "--moe-every 2 --experts 64 --aux-weight 0.003",
    "64 experts, sigmoid with bias": "--moe-every 2 --experts 64 --gate sigmoid",
    "128 experts": "--moe-every 2 --experts 128",
    "finer: 4 of 64 experts half as wide": "--moe-every 2 --experts 64 --top-k 4 --hidden 64",
    "finer: 4 of 128 experts half as wide": "--moe-every 2 --experts 128 --top-k 4 --hidden 64",
    "1 of 32 experts twice as wide": "--moe-every 2 --experts 32 --top-k 1 --hidden 256",
    "blocks 3 and 4, 64 experts": "--moe-layers 3,4 --experts 64",
    "block 4, 64 experts": "--moe-layers 4 --experts 64",
    "1 of 64 experts, and a shared one": "--moe-every 2 --experts 64 --top-k 1 --shared 1",
    "finer: 3 of 128, and a shared one": "--moe-every 2 --experts 128 --top-k 3 --hidden 64 --shared 1",
    "64 experts, GShard gate": "--moe-every 2 --experts 64 --gate gshard",
    "64 experts, capacity 1.25": "--moe-every 2 --experts 64 --capacity-factor 1.25",
    "64 experts, no QK-norm": "--moe-every 2 --experts 64 --no-qk-norm",
}


def table(out: Path, workers: int, flags: dict[str, str], seeds: list[int]) -> None:
    """Make the runs, and print bits per byte at the end, and then at each evaluation as means over the seeds."""
    runs = {name: [f"{given} --seed {seed}" for seed in seeds] for name, given in flags.items()}
    results = Runs(out, workers, JOB)([run for each in runs.values() for run in each])
    print("| model | bits per byte | seeds | imbalance | active parameters | parameters |\n|---|---|---|---|---|---|")
    for name, each in runs.items():
        found = [results[run] for run in each]
        bits = [result["val_bpb"] for result in found]
        imbalance = statistics.mean(result["imbalance"] for result in found)
        print(
            f"| {name} | {statistics.mean(bits):.3f} | {', '.join(f'{b:.3f}' for b in bits)} | {imbalance:.2f} | "
            f"{found[0]['active_parameters']:,} | {found[0]['parameters']:,} |"
        )
    print()
    for name, each in runs.items():
        curves = zip(*(evaluations(folder_of(out, run)) for run in each), strict=True)
        print(f"| {name} | {' | '.join(f'{statistics.mean(bits):.3f}' for bits in curves)} |")


def evaluations(folder: Path) -> list[float]:
    """Bits per byte of a run's evaluations, without the one before the first step."""
    events = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [event["bits_per_byte"] for event in events if event["event"] == "held out" and event["step"]]


def time(out: Path, rounds: int = 5) -> None:
    """Print the seconds of a step of the twins, which run 40 steps each in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in list(COMPARED)[:2]}
    for seed in range(rounds):
        for name, found in seconds.items():
            flags = f"{COMPARED[name]} --steps 40 --seed {seed}"  # the last --steps counts
            found.append(64 * 128 / Runs(out, 1, JOB)([flags])[flags]["tokens_per_s"])
    for name, found in seconds.items():
        print(f"{name.split(',')[0]}: {statistics.median(found):.3f} s a step ({min(found):.3f} to {max(found):.3f})")
    dense, mixture = (statistics.median(found) for found in seconds.values())
    print(f"mixture / dense: {mixture / dense:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "steps_saved")
    parser.add_argument("--workers", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(COMPARED), choices=COMPARED, help="rows of the table")
    parser.add_argument("--search", action="store_true", help="1,000 steps of 32 sequences, lr 0.008, with seed 0")
    parser.add_argument("--time", action="store_true", help="seconds of a step in place of bits per byte")
    args = parser.parse_args()
    out = args.out.resolve()
    if args.time:
        time(out / "time")
    elif args.search:
        table(out, args.workers, {name: f"--steps 1000 --lr 0.008 {flags}" for name, flags in SEARCHED.items()}, [0])
    else:
        table(out, args.workers, {name: COMPARED[name] for name in args.only}, args.seeds)


if __name__ == "__main__":
    main()
