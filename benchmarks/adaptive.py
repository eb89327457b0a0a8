"""Tokens to weights, or weights to tokens: how long does a layer take, forward and backward, by each choice?

    python benchmarks/cluster/emulate.py --nodes 4 --ranks 1 --rate 100mbit --delay 0.2ms -- benchmarks/adaptive.py
    torchrun --nproc-per-node 4 benchmarks/adaptive.py                         # no limited link: copies alone

One layer on W ranks, with E >= W experts (mesh "ep"), and with fewer (mesh "ep" x "etp"). Its choices run in turn in
each round; times are medians over rounds, of the slowest rank, after a barrier. Bytes are what a rank gets by the
arithmetic of docs/explanations/adaptive.md, largest over the ranks. With `--skewed`, expert i is picked like
1 / (1 + i), and the hottest ones are shadowed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from turnout.moe import Gate, MoE, Routing, parallelize


class Drawn(Gate):
    """k different experts for each token, drawn by fixed shares; the router learns nothing."""

    shares: Tensor

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [T, D]."""
        logits = self.logits(x) * 0
        drawn = torch.Generator().manual_seed(dist.get_rank())
        noise = -torch.rand(len(x), self.num_experts, generator=drawn).log()
        expert = (noise / self.shares).topk(self.top_k, largest=False).indices
        scores = logits.softmax(-1)
        return Routing(expert, scores.gather(1, expert), scores, logits)


def slowest(seconds: float) -> float:
    longest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return longest.item()


def once(layer: MoE, x: Tensor) -> float:
    dist.barrier()
    start = time.perf_counter()
    layer(x).sum().backward()
    return slowest(time.perf_counter() - start)


def megabytes(layer: MoE, tokens: int, choice: tuple[int, tuple[int, ...] | None], slices: int) -> float:
    """What the rank that gets most gets in forward and backward, in MB: rows, weights, and their gradients."""
    r, shadow = choice
    ranks, k, row = dist.get_world_size(), layer.top_k, 4 * layer.dim
    P, E = 4 * sum(p.numel() for p in layer.experts.parameters()), layer.num_experts
    if r == 0:
        return 2 * P * (ranks - 1) / ranks / 1e6
    counts = torch.bincount(layer._last[0].flatten(), minlength=E).double()  # pyright: ignore[reportOptionalSubscript]
    dist.all_reduce(counts)
    hot = list(shadow or ())
    counts[hot] = 0
    others = (ranks - slices) / ranks  # share of an expert's rows that ranks elsewhere on "ep" send
    arrive = counts.view(ranks // slices, -1).sum(1).max() / slices * others * row
    home = tokens * k * row * others
    inside = 2 * (r - 1) * counts.view(ranks // slices, -1).sum(1).max() / slices * row  # to r slices, and their sums
    weights = 2 * (P / ranks * (slices / r - 1)) + (2 * P / E * len(hot) if hot else 0)
    return float(2 * (arrive + home + inside) + weights) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 4096], help="of each rank")
    parser.add_argument("--skewed", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    ranks = dist.get_world_size()
    slices = 2 if ranks % 2 == 0 else 1
    for E, etp in [(2 * ranks, 1), (ranks // slices, slices)]:
        mesh = init_device_mesh("cpu", (ranks // etp, etp), mesh_dim_names=("ep", "etp"))
        gate = Drawn(args.dim, E, top_k=min(2, E))
        gate.shares = 1 / (1 + torch.arange(E)) if args.skewed else torch.ones(E)
        layer = parallelize(MoE(args.dim, args.hidden, E, gate=gate, balance=0.0, seed=0), mesh, "flat")
        choices: list[tuple[int, tuple[int, ...] | None]] = [
            (r, None) for r in range(etp + 1) if r == 0 or etp % r == 0
        ]
        choices += [(etp, tuple(range(n))) for n in (1, 2) if args.skewed and etp == 1]
        for tokens in args.tokens:
            x = torch.randn(tokens, args.dim, requires_grad=True)
            seconds: dict[tuple, list[float]] = {choice: [] for choice in choices}
            for counted in [False, *[True] * args.rounds]:
                for choice, times in seconds.items():
                    layer.parallelism, layer.shadow = choice
                    took = once(layer, x)
                    times += [took] if counted else []
            needs = {choice: megabytes(layer, tokens, choice, etp) for choice in choices}
            if not dist.get_rank():
                told = (
                    f"| r={r}{f' shadow={len(ids)}' if ids else ''} {1e3 * statistics.median(times):.0f} ms "
                    f"{needs[r, ids]:.2f} MB"
                    for (r, ids), times in seconds.items()
                )
                print(f"W={ranks} E={E} slices={etp} T={tokens}", *told, flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
