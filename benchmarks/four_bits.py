"""What do frozen experts in 4 bits take and cost under adapters (QLoRA), and what does their error do to a model?

    OMP_NUM_THREADS=1 python benchmarks/four_bits.py
    OMP_NUM_THREADS=1 python benchmarks/four_bits.py --loss      # a small GPT: its loss in 4 bits, and after adapters
    python benchmarks/four_bits.py --device cuda

One layer has frozen experts with adapters of rank 16, and each row is a fresh process. `experts` counts the bytes of
the experts' matrices. `peak` counts what a step allocates beyond the layer, adapters' gradients included (resident
memory on a CPU). `step` is the median time of forward and backward (processor time on a CPU). `error` compares the
layer's output with its output in `dtype`, relative, in the 2-norm. Weights are normal.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor
from turnout.models import GPT, GPTConfig, next_token_loss
from turnout.moe import MoE, aux_loss
from turnout.moe.adapters import add_lora, lora_parameters, quantize_experts

SHAPES = {"64 x 2048 x 768": (1024, 2048, 768, 64, 8), "8 x 4096 x 6144": (512, 4096, 6144, 8, 2)}  # T, D, H, E, k
RANK, MIB = 16, 2**20


def row(shape: str, dtype: torch.dtype, kind: str, device: str, rounds: int) -> str:
    """One line of the table, measured here."""
    T, D, H, E, k = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device("meta"):
        layer = MoE(D, H, E, k, balance=0)
    layer = layer.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.02)
    x = torch.randn(T, D, device=device, dtype=dtype)
    with torch.no_grad():
        exact = layer(x).float()
    if kind == "nf4":
        quantize_experts(layer)
    with torch.no_grad():
        error = float((layer(x).float() - exact).norm() / exact.norm())
    del exact
    experts = sum(p.nbytes for p in layer.experts.parameters()) / MIB
    add_lora(layer, RANK, router=False)
    gc.collect()

    def step() -> float:
        layer.zero_grad()
        start = now(device)
        layer(x).float().square().mean().backward()
        return now(device) - start

    peak_of = partial(peak, step, device)
    gained, times = peak_of(), [step() for _ in range(rounds + 1)][1:]
    figures = [f"{experts:.0f}", f"{gained:.0f}", f"{statistics.median(times) * 1e3:.0f}", f"{error:.3f}"]
    return " | ".join([shape, str(dtype).removeprefix("torch."), kind, *figures])


def now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak(step: Callable[[], float], device: str) -> float:
    """MiB that the process has at most during a step, over what it has before."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize() / MIB
    step()
    with open("/proc/self/status") as file:
        high = next(line for line in file if line.startswith("VmHWM"))
    return int(high.split()[1]) / 1024 - before


def losses(steps: int) -> None:
    """A small GPT is trained, quantised, and trained on with adapters: losses on held-out text, in nats a byte."""
    sys.path.insert(0, "examples")
    import corpus

    text, held_out = corpus.read(corpus.standard_library(), 128)
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=2, dim=128, hidden=128, num_experts=16, top_k=2))

    def train(model: GPT, parameters: list[Tensor], first: int, steps: int, rate: float) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=rate)
        for number in range(first, first + steps):
            batch = corpus.batch(text, 0, number, 16, 128, 0, 1, 1)
            (next_token_loss(model(batch[:, :-1]), batch[:, 1:]) + aux_loss(model)).backward()
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def evaluated(model: GPT) -> float:
        batch = corpus.held_out(held_out, 64, 128, 0, 1)
        model.eval()
        loss = float(next_token_loss(model(batch[:, :-1]), batch[:, 1:]))
        model.train()
        return loss

    train(model, list(model.parameters()), 0, steps, 3e-3)
    print(f"trained | {evaluated(model):.4f}", flush=True)
    four_bits = quantize_experts(deepcopy(model))
    print(f"its experts in 4 bits | {evaluated(four_bits):.4f}", flush=True)
    for name, each in (("adapters beside 4 bits", four_bits), ("adapters beside the trained", model)):
        train(each, list(lora_parameters(add_lora(each, RANK)).values()), steps, steps // 4, 1e-3)
        print(f"{name}, {steps // 4} steps more | {evaluated(each):.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loss", action="store_true", help="a small GPT in place of a layer")
    parser.add_argument("--steps", type=int, default=400, help="of --loss")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loss:
        losses(options.steps)
    elif options.row:
        shape, dtype, kind = options.row
        print(row(shape, getattr(torch, dtype), kind, options.device, options.rounds), flush=True)
    else:
        print("E x D x H | dtype | experts | MiB | peak MiB | step ms | error")
        for shape in SHAPES:
            for dtype in ("bfloat16", "float32"):
                for kind in ("as they are", "nf4"):
                    asked = ["--row", shape, dtype, kind, "--device", options.device, "--rounds", str(options.rounds)]
                    subprocess.run([sys.executable, __file__, *asked], check=True)


if __name__ == "__main__":
    main()
