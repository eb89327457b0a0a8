"""Which experts do the bytes of a real run visit? Records a short run of the main job for `adaptive.py`.

    OMP_NUM_THREADS=1 python benchmarks/record_routing.py          # writes benchmarks/data/routing.npz, in 4 minutes

The main job trains without a balance loss, on one rank and Python's own source, once for each number of experts. The
file has the routings of one batch after some of the steps, as `turnout.moe.replay.record` returns them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from turnout.dispatch import Meshes
from turnout.moe import GradScaler
from turnout.moe.replay import record

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import corpus  # noqa: E402
import options  # noqa: E402
import steps  # noqa: E402

EXPERTS, AFTER = (2, 4, 8, 16), (10, 50, 200)  # numbers of experts, and steps after which a batch is recorded


def routings(experts: int, text: torch.Tensor, after: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Experts uint8 [layers, tokens, k] of a batch after so many steps, by the names in the file."""
    job = options.Job(experts=experts, top_k=min(2, experts // 2), aux_weight=0.0, batch=16, dim=64, hidden=64)
    job = job.fit(ranks=1)
    meshes = Meshes.of("cpu")
    model = steps.build(job, meshes)
    optimizer, scaler, found = steps.adamw(model, job.lr), GradScaler("cpu", enabled=False), {}
    for step in range(max(after) + 1):
        tokens = steps.batch(job, text, step, meshes)
        with record(model) as seen:
            steps.train(model, optimizer, scaler, tokens, job.lr_at(step))
        if step in after:
            found[f"experts {experts}, step {step}"] = seen.numpy().astype(np.uint8)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "data" / "routing.npz")
    parser.add_argument("--steps", type=int, nargs="+", default=AFTER)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="tcp://localhost:0", rank=0, world_size=1)
    text, _ = corpus.read(corpus.standard_library(), 128)
    found: dict[str, np.ndarray] = {}
    for experts in EXPERTS:
        found |= routings(experts, text, tuple(args.steps))
        for name, ids in found.items():
            loads = [np.bincount(layer.ravel(), minlength=experts) for layer in ids] if f"{experts}," in name else []
            for layer, load in enumerate(loads):
                print(f"{name}, layer {layer}: largest load {load.max() / load.mean():.2f} times the mean", flush=True)
    args.out.parent.mkdir(exist_ok=True)
    np.savez_compressed(args.out, **found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
