"""How much time and memory do thousands of experts need on one rank? Forward and backward, with equal tokens and k.

    OMP_NUM_THREADS=1 python benchmarks/many_experts.py

Each row is measured in a new process. `build` is the time to make the layer, `step` the median of forward and backward
with the balance loss. Both are processor time. Gradients are None before each step. `weights` is the memory of the
parameters, and gradients need as much again. `peak` is the peak memory above the built layer, with gradients. Weights
and gradients must grow with E, and so must a gate's matrices of T*E scores. `kept` is the number of such matrices that
autograd keeps for the backward. The hash gate has none, so its rows show the cost of everything else.
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
    """Measure one row of the table in this process."""
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
    """Number of float matrices of T*E elements that are saved for the backward, without x, which has T*E if E = D."""
    E, saved = layer.num_experts, {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if tensor.is_floating_point() and tensor.numel() == T * E and len(tensor) == T and address != x.data_ptr():
            saved[address] = tensor  # kept alive, so that no address is used again
        return tensor

    parameters = {p.data_ptr() for p in layer.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, loss = layer(x, ids=ids), aux_loss(layer)
    del y, loss
    return len(saved.keys() - parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--row", nargs=2, metavar=("GATE", "E"), help="measure only this row, and print no head")
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
