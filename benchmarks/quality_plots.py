"""Draws the picture of docs/guides/choosing.md from the runs of benchmarks/quality.py.

python benchmarks/quality_plots.py            # runs/quality -> docs/images
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from quality import ROOT, VARIANTS, folder_of, named

BALANCE = ("no balance loss", "aux 0.001", "topk, top-2 of 8, dropless, aux 0.01", "aux 0.1")
CAPACITY = ("capacity 1.0", "capacity 1.25", "gshard, capacity 1.25", "switch, capacity 1.25")


def log(runs: Path, flags: str) -> dict[str, list] | None:
    """Curves of a run, `dropped` and `imbalance`, with their `step`; None if the run is missing."""
    path = folder_of(runs, flags) / "log.jsonl"
    if not path.exists():
        return None
    lines = [event for event in map(json.loads, path.read_text().splitlines()) if event["event"] == "step"]
    return {
        "step": [line["step"] for line in lines],
        "dropped": [sum(line["dropped"]) / max(1, len(line["dropped"])) for line in lines],
        "imbalance": [max(line["imbalance"], default=1.0) for line in lines],
    }


def smooth(values: list[float], width: int = 5) -> np.ndarray:
    return np.convolve(values, np.ones(width) / width, "valid")


def each(runs: Path, lr: float, names: tuple[str, ...], key: str, axis: plt.Axes) -> None:
    for name in names:
        if found := log(runs, named(VARIANTS[name], lr, 0)):
            values = smooth(found[key])
            axis.plot(found["step"][: len(values)], values, lw=1.2, label=name)
    axis.set_xlabel("step")


def save(figure: plt.Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
    each(args.runs, args.lr, BALANCE, "imbalance", left)
    left.set(ylabel="largest load / mean load", title="weight of the balance loss")
    each(args.runs, args.lr, CAPACITY, "dropped", right)
    right.set(ylabel="share of assignments dropped", title="capacity")
    save(figure, args.out / "balance.png")


if __name__ == "__main__":
    main()
