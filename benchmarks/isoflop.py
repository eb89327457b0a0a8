"""How much compute does a mixture save? Four budgets of FLOPs, each spent by models of several widths, dense or not.

    OMP_NUM_THREADS=1 python benchmarks/isoflop.py --workers 2

A narrow model sees more tokens for the same FLOPs than a wide one, so each budget has a best width (the isoFLOP curves
of Hoffmann et al. 2022, arXiv:2203.15556). This prints all runs, the best of each budget by a parabola over the
logarithm of active parameters, and a power law through these. Each run is the main job, in one process with one thread.
Runs that are in --out are not made again. The results are in docs/records/quality.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from quality import ROOT, Runs

sys.path.insert(0, str(ROOT / "examples"))
import options
from turnout.models.pipeline.partition import model_of

CONFIG = "examples/configs/quick.toml"
JOB = f"--config {CONFIG} --balance global --eval-every 100000 --eval-size 512 --save-every 100000"
# FLOPs of a run, forward and backward, without the optimizer; and the widths that may be the best for them
BUDGETS = {0.5e12: (16, 24, 32, 48), 1e12: (16, 24, 32, 48), 2e12: (16, 24, 32, 48), 4e12: (24, 32, 48, 64)}
HEADS = {16: 1, 24: 1, 32: 2, 48: 3, 64: 4}  # by width
# each with its best learning rate at width 32
MODELS = {"dense": "--dense --lr 0.016", "mixture": "--moe-every 2 --experts 64 --lr 0.008"}


def flags_of(model: str, width: int, budget: float) -> str:
    """Flags of the run that spends a budget on a model of some width: experts are 4 times as wide."""
    sizes = f"{MODELS[model]} --dim {width} --heads {HEADS[width]} --hidden {4 * width}"
    job = options.parse([*JOB.split(), *sizes.split()])
    with torch.device("meta"):
        flops = model_of(job.config()).flops_per_token()
    return f"{sizes} --steps {round(budget / (flops * job.batch * job.seq))}"


def lowest(active: list[int], bits: list[float]) -> tuple[float, float]:
    """Active parameters and bits per byte at the minimum of a parabola over log10 of the active parameters."""
    a, b, c = np.polyfit(np.log10(active), bits, 2)
    at = -b / (2 * a) if a > 0 else np.log10(active)[np.argmin(bits)]
    at = float(np.clip(at, np.log10(min(active)), np.log10(max(active))))
    return 10**at, float(np.polyval((a, b, c), at))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "isoflop")
    parser.add_argument("--workers", type=int, default=1, help="number of runs at a time")
    args = parser.parse_args()
    cells = [(budget, model, width) for budget, widths in BUDGETS.items() for model in MODELS for width in widths]
    flags = {cell: flags_of(cell[1], cell[2], cell[0]) for cell in cells}
    results = Runs(args.out.resolve(), args.workers, JOB)(list(flags.values()))
    print("| FLOPs of a run | model | width | active parameters | bytes trained on | bits per byte |")
    print("|---|---|---|---|---|---|")
    for cell in cells:
        found = results[flags[cell]]
        print(
            f"| {cell[0] / 1e12:.1f}e12 | {cell[1]} | {cell[2]} | {found['active_parameters']:,} | "
            f"{found['steps'] * 32 * 128:,} | {found['val_bpb']:.3f} |"
        )
    best: dict[str, list[tuple[float, float]]] = {model: [] for model in MODELS}
    for budget, widths in BUDGETS.items():
        for model, found in best.items():
            runs = [results[flags[budget, model, width]] for width in widths]
            found.append(lowest([run["active_parameters"] for run in runs], [run["val_bpb"] for run in runs]))
    flops = np.log10(list(BUDGETS))
    dense, mixture = (np.array([bits for _, bits in found]) for found in best.values())
    needs = 10 ** (np.interp(-dense, -mixture, flops) - flops)  # between two budgets, over the logarithm of FLOPs
    print(
        "\n| best of a budget | dense: active parameters | bits | mixture: active parameters | bits | FLOPs it needs |"
    )
    print("|---|---|---|---|---|---|")
    for budget, *found, share in zip(BUDGETS, *best.values(), needs, strict=True):
        sizes = " | ".join(f"{active:,.0f} | {bits:.3f}" for active, bits in found)
        print(f"| {budget / 1e12:.1f}e12 | {sizes} | {share:.2f} |")
    for model, bits in zip(MODELS, (dense, mixture), strict=True):
        slope, at = np.polyfit(flops - 12, np.log10(bits), 1)
        print(f"\n{model}: bits = {10**at:.3f} x (FLOPs / 1e12) ^ {slope:.3f}")


if __name__ == "__main__":
    main()
