"""What do thousands of experts on one rank cost, with equal tokens and equal k? Forward and backward.

    OMP_NUM_THREADS=1 python benchmarks/many_experts.py

Each row is a fresh process. `build` is the time to make the layer; `step` the median of forward and
backward with the balance loss, gradients being None before each; both are processor time. `weights` are
the layer's parameters, as large again as gradients; `peak` is what the process gained over the built
layer, gradients included. Inherent: weights and gradients in proportion to E, and a gate's matrices of T*E
scores; `kept` is how many of these autograd holds from forward to backward. The hash gate has none: its
rows are what all the rest costs.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor
from turnout.moe import MoE, aux_loss

T, D, H, K = 4096, 64, 64, 2
ROWS = [(gate, E) for gate in ("topk", "noisy_topk", "hierarchical", "hash") for E in (64, 512, 4096)]
MIB = 2**20


def row(gate: str, E: int, rounds: int) -> str:
    """One line of the table, measured here."""
    torch.manual_seed(0)
    start = time.process_time()
    layer = MoE(D, H, E, K, gate=gate, experts="gelu")
    build = time.process_time() - start
    x, grad, ids = torch.randn(T, D, requires_grad=True), torch.randn(T, D), torch.arange(T)

    def step() -> float:
        layer.zero_grad()
        x.grad = None
        start = time.process_time()
        ((layer(x, ids=ids) * grad).sum() + aux_loss(layer)).backward()
        return time.process_time() - start

    before = resident()
    times = [step() for _ in range(rounds + 2)][2:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    weights = sum(p.numel() * p.element_size() for p in layer.parameters()) / MIB
    cells = [gate, str(E), f"{build:.2f}", f"{statistics.median(times) * 1e3:.1f}", f"{weights:.0f}", f"{peak:.0f}"]
    return " | ".join([*cells, str(kept(layer, x, ids))])


def resident() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / MIB


def kept(layer: MoE, x: Tensor, ids: Tensor) -> int:
    """Float matrices of T*E saved for backward, each counted once; x itself is none, should E be D."""
    E, saved = layer.num_experts, {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if tensor.is_floating_point() and tensor.numel() == T * E and len(tensor) == T and address != x.data_ptr():
            saved[address] = tensor  # held, so that no address comes twice
        return tensor

    parameters = {p.data_ptr() for p in layer.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, loss = layer(x, ids=ids), aux_loss(layer)
    del y, loss
    return len(saved.keys() - parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--row", nargs=2, metavar=("GATE", "E"), help="this row alone, without the table's head")
    args = parser.parse_args()
    if args.row:
        print(f"| {row(args.row[0], int(args.row[1]), args.rounds)} |", flush=True)
        return
    head = f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {args.rounds} rounds"
    print(f"{head}, T={T} D={D} H={H} k={K}\n")
    print("| gate | E | build s | step ms | weights MiB | peak MiB | T*E kept |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for gate, E in ROWS:
        command = [sys.executable, __file__, "--rounds", str(args.rounds), "--row", gate, str(E)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
