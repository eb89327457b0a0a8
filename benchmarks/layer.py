"""How fast is the layer on a CPU, beside its matrix products? Forward and backward on one rank.

    OMP_NUM_THREADS=1 python benchmarks/layer.py
    MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_MAX_=0 OMP_NUM_THREADS=1 python benchmarks/layer.py
    OMP_NUM_THREADS=1 python benchmarks/layer.py --only dense bare layer --dtype bfloat16
    OMP_NUM_THREADS=1 python benchmarks/layer.py --processor --only bare layer "all at once"
    OMP_NUM_THREADS=2 python benchmarks/layer.py --activation swiglu --only torch bare layer padded index loop bmm hf
    OMP_NUM_THREADS=1 python benchmarks/layer.py --peak

The second command stops glibc from returning memory to the system between steps, as other allocators do by default.
Then no time is spent on zeroing new pages.

Lower bounds: `dense` is an MLP of equal active FLOPs. `bare` has only the grouped matrix products and the activation,
on sorted rows, and `torch` the same with torch's grouped_mm. Alternatives with routing: `all at once` is the layer as
on other devices, where rows are encoded and each product covers all experts. `padded` is the layer with capacity factor
1.25. `index` uses torch's grouped_mm and plain index operations, `loop` one product per expert, and `bmm` rows padded
to the largest load. `hf` is Mixtral's block of transformers with its grouped_mm, if that is installed (SwiGLU only).

All run in turn in each round. Results are medians over rounds, as ratios to the first. Gradients are None before each
run. On a CPU without bfloat16 products, torch's take 4 to 90 times as long as float32. There `dense`, `bare` and the
layer compute in float32, and `torch`, `index`, `loop`, `bmm` and `hf`, which would need minutes per step, are left out.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turnout.dispatch.torch_internals import has_half_products
from turnout.moe import Capacity, MoE, aux_loss
from turnout.moe.experts.activation import ACTIVATIONS
from turnout.moe.experts.feed_forward import FeedForwardExperts
from turnout.moe.experts.grouped_mm import grouped_mm

# T, D, H, E, k; the last is of the smallest models, in which small operators take longer than products
SIZES = [(2048, 256, 512, 8, 2), (4096, 512, 1024, 16, 2), (4096, 512, 256, 64, 8), (4096, 32, 128, 32, 2)]


def ours(layer: MoE, x: Tensor) -> Tensor:
    """The layer with its balance loss, but without the backward of that loss."""
    y = layer(x)
    aux_loss(layer, keep=False)
    return y


def route(layer: MoE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Router and sort in plain PyTorch: token of each row, weight of each row, number of rows per expert."""
    weight, expert = F.linear(x.float(), layer.gate.weight.float()).softmax(-1).topk(layer.top_k)
    weight = (weight / weight.sum(-1, keepdim=True)).flatten()
    order = expert.flatten().argsort(stable=True)
    counts = torch.bincount(expert.flatten(), minlength=layer.num_experts)
    return order // layer.top_k, weight[order].unsqueeze(1), counts


def home(y: Tensor, weight: Tensor, token: Tensor, x: Tensor) -> Tensor:
    return torch.zeros_like(x).index_add(0, token, (y * weight).to(x.dtype))


def projections(layer: MoE) -> list[Tensor]:
    """The matrices before the activation: up, and gate if there is one."""
    names = ("w_up", "w_gate") if ACTIVATIONS[layer.experts.activation].gated else ("w_up",)
    return [getattr(layer.experts, name) for name in names]


def activated(up: Tensor, gate: Tensor | None = None) -> Tensor:
    """GELU or SwiGLU in plain PyTorch."""
    return F.gelu(up) if gate is None else F.silu(gate) * up


def torch_grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows, weight, offs=ends)


def index(layer: MoE, x: Tensor) -> Tensor:
    token, weight, counts = route(layer, x)
    return home(grouped(layer, x[token], counts, torch_grouped_mm), weight, token, x)


def grouped(layer: MoE, rows: Tensor, counts: Tensor, product: Callable[..., Tensor] = grouped_mm) -> Tensor:
    ends = counts.cumsum(0).to(torch.int32)
    hidden = activated(*(product(rows, matrix, ends) for matrix in projections(layer)))
    return product(hidden, layer.experts.w_down, ends)


def all_at_once(layer: MoE, x: Tensor) -> Tensor:
    """The layer without its special path for CPUs."""
    by_group, FeedForwardExperts._in_blocks = FeedForwardExperts._in_blocks, lambda *args: False
    try:
        return ours(layer, x)
    finally:
        FeedForwardExperts._in_blocks = by_group


def loop(layer: MoE, x: Tensor) -> Tensor:
    token, weight, counts = route(layer, x)
    matrices = (m.unbind(0) for m in (layer.experts.w_down, *projections(layer)))
    parts = zip(x[token].split(counts.tolist()), *matrices, strict=True)
    return home(torch.cat([activated(*(b @ u for u in ups)) @ down for b, down, *ups in parts]), weight, token, x)


def bmm(layer: MoE, x: Tensor) -> Tensor:
    token, weight, counts = route(layer, x)
    expert = torch.repeat_interleave(torch.arange(len(counts)), counts)
    place = torch.arange(len(token)) - (counts.cumsum(0) - counts)[expert]
    padded = x.new_zeros(len(counts), int(counts.max()), x.shape[1]).index_put((expert, place), x[token])
    y = torch.bmm(activated(*(torch.bmm(padded, matrix) for matrix in projections(layer))), layer.experts.w_down)
    return home(y[expert, place], weight, token, x)


def mixtral(layer: MoE, dtype: torch.dtype) -> nn.Module | None:
    """Mixtral's block with the layer's sizes and random weights, or None without transformers."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        return None
    D, H = layer.experts.dim, layer.experts.hidden
    config = MixtralConfig(
        hidden_size=D, intermediate_size=H, num_local_experts=layer.num_experts, num_experts_per_tok=layer.top_k
    )
    config._experts_implementation = "grouped_mm"
    block = MixtralSparseMoeBlock(config).to(dtype)
    with torch.no_grad():
        block.gate.weight.copy_(layer.gate.weight)  # the same loads
        block.experts.gate_up_proj.normal_(std=D**-0.5)
        block.experts.down_proj.normal_(std=H**-0.5)
    return block


def timed(forward: Callable[[], Tensor], grad: Tensor, tensors: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for tensor in tensors:
            tensor.grad = None
        forward().backward(grad)

    return run


def contenders(
    T: int, D: int, H: int, E: int, k: int, dtype: torch.dtype, activation: str
) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    layer = MoE(D, H, E, k, experts=activation).to(dtype)
    padded = MoE(D, H, E, k, experts=activation, capacity=Capacity(1.25, pad=True)).to(dtype)
    padded.load_state_dict(layer.state_dict())
    x, grad = torch.randn(T, D, dtype=dtype, requires_grad=True), torch.randn(T, D, dtype=dtype)
    rows, rows_grad = torch.randn(T * k, D, dtype=dtype, requires_grad=True), torch.randn(T * k, D, dtype=dtype)
    native = dtype == torch.float32 or has_half_products(dtype)
    wide = dtype if native else torch.float32
    ups = [torch.randn(D, k * H, dtype=wide, requires_grad=True) for _ in projections(layer)]
    down = torch.randn(k * H, D, dtype=wide, requires_grad=True)
    dense, dense_grad = x.detach().to(wide).requires_grad_(), grad.to(wide)
    layer(x)
    counts = layer.stats.tokens_per_expert
    tensors = [x, rows, *ups, down, dense, *layer.parameters(), *padded.parameters()]
    bounds = {"bare": partial(grouped, layer, rows, counts)}
    routed = {name: partial(ours, which) for name, which in {"layer": layer, "padded": padded}.items()}
    routed["all at once"] = partial(all_at_once, layer)
    if native:
        bounds["torch"] = partial(grouped, layer, rows, counts, torch_grouped_mm)
        routed |= {"index": partial(index, layer), "loop": partial(loop, layer), "bmm": partial(bmm, layer)}
        block = mixtral(layer, dtype) if activation == "swiglu" else None
        if block is not None:
            tensors += block.parameters()
            routed["hf"] = lambda x: block(x.unsqueeze(0)).squeeze(0)
    return {
        "dense": timed(lambda: activated(*(dense @ up for up in ups)) @ down, dense_grad, tensors),
        **{name: timed(run, rows_grad, tensors) for name, run in bounds.items()},
        **{name: timed(partial(run, x), grad, tensors) for name, run in routed.items()},
    }


def compiled(
    T: int, D: int, H: int, E: int, k: int, dtype: torch.dtype, activation: str
) -> dict[str, Callable[[], None]]:
    """The layer, dropless and padded, in eager mode and under torch.compile."""
    torch._dynamo.reset()
    x, grad = torch.randn(T, D, dtype=dtype, requires_grad=True), torch.randn(T, D, dtype=dtype)
    runs = {}
    for name, options in {"layer": {}, "padded": {"capacity": Capacity(1.25, pad=True)}}.items():
        torch.manual_seed(0)
        layer = MoE(D, H, E, k, experts=activation, **options).to(dtype)
        layer.balance = 0  # the step has no `aux_loss`
        tensors = [x, *layer.parameters()]
        runs[name] = timed(partial(layer, x), grad, tensors)
        runs[f"{name}, compiled"] = timed(partial(torch.compile(layer, fullgraph=True), x), grad, tensors)
    return runs


def measure(
    runs: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each run in each round; in a round all run in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for counted in range(-2, rounds):
        for name, run in runs.items():
            start = clock()
            run()
            if counted >= 0:
                times[name].append(clock() - start)
    return times


def peak(run: Callable[[], None]) -> float:
    """MiB by which the peak memory of a new process grows while it calls `run` twice."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with open("/proc/self/statm") as file:
            before = int(file.read().split()[1]) * resource.getpagesize() / 1024
        run()
        run()
        gained = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        os.write(writing, str(gained).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        gained = float(file.read())
    os.waitpid(child, 0)
    return gained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", help="names of the contenders to run; ratios are to the first")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--activation", choices=["gelu", "swiglu"], default="gelu")
    parser.add_argument("--minimum", action="store_true", help="print the fastest round, not the median")
    parser.add_argument("--processor", action="store_true", help="measure processor time, for a busy machine")
    parser.add_argument("--peak", action="store_true", help="measure peak MiB above layer and input, in new processes")
    parser.add_argument("--compile", action="store_true", help="compare the layer with itself under torch.compile")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.activation}, {torch.get_num_threads()} thread(s), {args.rounds} rounds\n")
    typical = min if args.minimum else statistics.median
    clock = time.process_time if args.processor else time.perf_counter
    for size in SIZES:
        for dtype in args.dtype:
            runs = (compiled if args.compile else contenders)(*size, getattr(torch, dtype), args.activation)
            runs = {name: run for name, run in runs.items() if name in (args.only or runs)}
            cells = {"T, D, H, E, k": ", ".join(map(str, size)), "dtype": dtype}
            if args.peak:
                cells |= {f"{name} MiB": f"{peak(run):.0f}" for name, run in runs.items()}
            else:
                times = {name: typical(seconds) for name, seconds in measure(runs, args.rounds, clock).items()}
                base, *others = times
                cells[f"{base} ms"] = f"{times[base] * 1e3:.1f}"
                cells |= {name: f"{times[name] / times[base]:.2f}" for name in others}
                if times.keys() >= {"bare", "layer"}:
                    cells["layer / bare"] = f"{times['layer'] / times['bare']:.2f}"
                if times.keys() >= {"torch", "layer"}:
                    cells["layer / torch"] = f"{times['layer'] / times['torch']:.2f}"
                plain = [times[name] for name in ("index", "loop", "bmm", "hf") if name in times]
                if not args.compile and (plain or not args.only):
                    cells["layer / best other"] = f"{times['layer'] / min(plain):.2f}" if plain else ""
            if (size, dtype) == (SIZES[0], args.dtype[0]):
                columns = list(cells)
                print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
            print("| " + " | ".join(cells.get(column, "") for column in columns) + " |", flush=True)


if __name__ == "__main__":
    main()
