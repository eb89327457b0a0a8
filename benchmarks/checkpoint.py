"""How long does training wait for a checkpoint, and when is it on the disk? Synchronous and asynchronous saves.

    for n in 1 2 4; do OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node $n benchmarks/checkpoint.py; done

The model is a GPT with experts on all ranks, and AdamW. Kinds of saving alternate. A number is the median over rounds
of the slowest rank. While a thread writes, ranks either wait or train on. In the second case steps during the write are
compared with steps alone. Lower bounds follow, measured on all ranks at once: a copy of the rank's bytes in memory,
their SHA-256, and a write of them to one file with fsync.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW
from turnout.dispatch import Meshes
from turnout.models import GPTConfig, ParallelModel, checkpoint, parallel_model
from turnout.models.checkpoint.contents import Contents
from turnout.moe import param_groups
from turnout.moe.experts.sharded import local


def timed(call: Callable) -> float:
    """Seconds that a call takes on the slowest rank. All ranks start together."""
    dist.barrier()
    start = time.perf_counter()
    call()
    return slowest(time.perf_counter() - start)


def slowest(seconds: float) -> float:
    most = torch.tensor(seconds)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most)


class Bench:
    """Model in training, with the kinds of saving."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        torch.manual_seed(0)
        ranks = dist.get_world_size()
        sizes = {"layers": args.layers, "dim": args.dim, "heads": 4, "hidden": args.hidden, "num_experts": 8}
        self.model: ParallelModel = parallel_model(GPTConfig(**sizes), Meshes.of("cpu", ep=ranks))
        self.optimizer = AdamW(param_groups(self.model), lr=1e-4)
        self.tokens = torch.randint(256, (2, 65))
        self.folder, self.number = folder, 0
        self.checkpointer = checkpoint.AsyncCheckpointer(folder, keep=1)
        self.step()
        values = Contents(self.model.parts, self.optimizer).values().values()
        self.bytes = sum(local(value).nbytes for value in values if isinstance(value, Tensor))
        self.flat, self.copy = torch.ones(self.bytes // 4), torch.empty(self.bytes // 4)

    def step(self) -> None:
        self.model.step(self.tokens[:, :-1], self.tokens[:, 1:])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self) -> dict[str, float]:
        self.number += 1

        def save() -> None:
            checkpoint.save(self.folder, self.model.parts, self.optimizer, self.number)

        return {"save: stall and total": timed(save)}

    def save_async(self, train: bool) -> dict[str, float]:
        self.number += 1
        dist.barrier()
        self.checkpointer.save(self.model.parts, self.optimizer, self.number)
        steps = []
        while train and (saved := self.checkpointer.poll()) is None:
            steps.append(timed(self.step))
        saved = saved if train else self.checkpointer.wait()
        assert saved is not None
        kind = "async, training on" if train else "async"
        found = {f"{kind}: stall": slowest(saved.stalled), f"{kind}: total": slowest(saved.seconds)}
        return found | {"step meanwhile": statistics.median(steps)} if steps else found

    def floors(self) -> dict[str, float]:
        data, file = memoryview(self.flat.numpy()).cast("B"), self.folder / f"floor-{dist.get_rank()}"

        def write() -> None:
            with file.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())

        found = {
            "step alone": timed(self.step),
            "copy": timed(lambda: self.copy.copy_(self.flat)),
            "hash": timed(lambda: hashlib.sha256(data)),
            "write": timed(write),
        }
        file.unlink()
        return found

    def load(self) -> dict[str, float]:
        path = self.folder / f"step-{self.number}"
        return {"load": timed(lambda: checkpoint.load(path, self.model.parts, self.optimizer))}

    def round(self) -> dict[str, float]:
        return self.save() | self.save_async(False) | self.save_async(True) | self.floors() | self.load()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="folder on the disk to measure (default: one for temporary files)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    place = [tempfile.mkdtemp(dir=args.folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(place)
    bench = Bench(args, folder := Path(str(place[0])))
    first = bench.save_async(False)["async: stall"]
    rounds = [bench.round() for _ in range(args.rounds + 1)][1:]
    if dist.get_rank() == 0:
        size = sum(file.stat().st_size for file in (folder / f"step-{bench.number}").iterdir())
        ms = {name: statistics.median(each[name] for each in rounds if name in each) * 1e3 for name in rounds[0]}
        parts = f"{dist.get_world_size()} ranks on {os.cpu_count()} cores, {bench.bytes / 1e6:.0f} MB on rank 0"
        print(f"torch {torch.__version__}, {parts}, {size / 1e6:.0f} MB on the disk, {args.rounds} rounds\n")
        print("| | ms, median |\n|---|---|")
        for name, value in (ms | {"async: first stall": first * 1e3}).items():
            print(f"| {name} | {value:.0f} |", flush=True)
        shutil.rmtree(folder)
    bench.checkpointer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
