"""What does the layer cost beside its matrix products? Forward and backward on one rank, one thread or more.

    OMP_NUM_THREADS=1 python benchmarks/layer.py
    MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_MAX_=0 OMP_NUM_THREADS=1 python benchmarks/layer.py

The second keeps glibc from handing memory back between steps, whose pages the kernel must fill with zeros again
(other allocators do so by themselves): what is left is the layer's own time.

Floors: `dense`, a perceptron of equal active FLOPs, and `bare`, the grouped matrix products and the
activation alone, on rows already sorted. Alternatives that route as well: `index`, grouped_mm with plain
index operations; `loop`, one product an expert; `bmm`, rows padded to the largest load. All run in turn
in each round; medians over rounds, as ratios to `dense`; gradients are None before each run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from turnout.moe import MoE

SIZES = [(2048, 256, 512, 8, 2), (4096, 512, 1024, 16, 2), (4096, 512, 256, 64, 8)]  # T, D, H, E, k


def route(layer: MoE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted as the plain way has it: token of each row, weight of each row, rows per expert."""
    weight, expert = F.linear(x.float(), layer.gate.weight.float()).softmax(-1).topk(layer.top_k)
    weight = (weight / weight.sum(-1, keepdim=True)).flatten()
    order = expert.flatten().argsort(stable=True)
    counts = torch.bincount(expert.flatten(), minlength=layer.num_experts)
    return order // layer.top_k, weight[order].unsqueeze(1), counts


def home(y: Tensor, weight: Tensor, token: Tensor, x: Tensor) -> Tensor:
    return torch.zeros_like(x).index_add(0, token, (y * weight).to(x.dtype))


def index(layer: MoE, x: Tensor) -> Tensor:
    token, weight, counts = route(layer, x)
    return home(grouped(layer, x[token], counts), weight, token, x)


def grouped(layer: MoE, rows: Tensor, counts: Tensor) -> Tensor:
    ends = counts.cumsum(0).to(torch.int32)
    up, down = layer.experts.w_up, layer.experts.w_down
    return F.grouped_mm(F.gelu(F.grouped_mm(rows, up, offs=ends)), down, offs=ends)


def loop(layer: MoE, x: Tensor) -> Tensor:
    token, weight, counts = route(layer, x)
    up, down = layer.experts.w_up.unbind(0), layer.experts.w_down.unbind(0)
    blocks = x[token].split(counts.tolist())
    return home(torch.cat([F.gelu(b @ u) @ d for b, u, d in zip(blocks, up, down, strict=True)]), weight, token, x)


def bmm(layer: MoE, x: Tensor) -> Tensor:
    token, weight, counts = route(layer, x)
    expert = torch.repeat_interleave(torch.arange(len(counts)), counts)
    place = torch.arange(len(token)) - (counts.cumsum(0) - counts)[expert]
    padded = x.new_zeros(len(counts), int(counts.max()), x.shape[1]).index_put((expert, place), x[token])
    y = torch.bmm(F.gelu(torch.bmm(padded, layer.experts.w_up)), layer.experts.w_down)
    return home(y[expert, place], weight, token, x)


def timed(forward: Callable[[], Tensor], grad: Tensor, tensors: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for tensor in tensors:
            tensor.grad = None
        forward().backward(grad)

    return run


def contenders(T: int, D: int, H: int, E: int, k: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    layer = MoE(D, H, E, k, experts="gelu").to(dtype)
    x, grad = torch.randn(T, D, dtype=dtype, requires_grad=True), torch.randn(T, D, dtype=dtype)
    rows, rows_grad = torch.randn(T * k, D, dtype=dtype, requires_grad=True), torch.randn(T * k, D, dtype=dtype)
    up = torch.randn(D, k * H, dtype=dtype, requires_grad=True)
    down = torch.randn(k * H, D, dtype=dtype, requires_grad=True)
    layer(x)
    counts = layer.stats.tokens_per_expert
    tensors = [x, rows, up, down, *layer.parameters()]
    routed = {"layer": layer, "index": partial(index, layer), "loop": partial(loop, layer), "bmm": partial(bmm, layer)}
    return {
        "dense": timed(lambda: F.gelu(x @ up) @ down, grad, tensors),
        "bare": timed(lambda: grouped(layer, rows, counts), rows_grad, tensors),
        **{name: timed(partial(run, x), grad, tensors) for name, run in routed.items()},
    }


def compiled(T: int, D: int, H: int, E: int, k: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """The layer, dropless and padded, as it is and under torch.compile."""
    torch._dynamo.reset()
    x, grad = torch.randn(T, D, dtype=dtype, requires_grad=True), torch.randn(T, D, dtype=dtype)
    runs = {}
    for name, options in {"layer": {}, "padded": {"capacity_factor": 1.25, "pad": True}}.items():
        torch.manual_seed(0)
        layer = MoE(D, H, E, k, experts="gelu", **options).to(dtype)
        layer.aux_loss_weight = 0  # without `aux_loss` in the step
        tensors = [x, *layer.parameters()]
        runs[name] = timed(partial(layer, x), grad, tensors)
        runs[f"{name}, compiled"] = timed(partial(torch.compile(layer, fullgraph=True), x), grad, tensors)
    return runs


def measure(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each, all in turn in every round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for counted in range(-2, rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if counted >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="the layer under torch.compile instead, to `layer`")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {args.rounds} rounds\n")
    for size in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            times = measure((compiled if args.compile else contenders)(*size, dtype), args.rounds)
            base, *others = times
            cells = {
                "T, D, H, E, k": ", ".join(map(str, size)),
                "dtype": str(dtype).removeprefix("torch."),
                f"{base} ms": f"{times[base] * 1e3:.1f}",
                **{name: f"{times[name] / times[base]:.2f}" for name in others},
            }
            if not args.compile:
                cells["layer / bare"] = f"{times['layer'] / times['bare']:.2f}"
                cells["layer / best other"] = f"{times['layer'] / min(times[n] for n in ('index', 'loop', 'bmm')):.2f}"
            if (size, dtype) == (SIZES[0], torch.float32):
                print("| " + " | ".join(cells) + " |\n|" + "---|" * len(cells))
            print("| " + " | ".join(cells.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
