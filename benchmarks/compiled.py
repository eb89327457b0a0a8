"""Is a whole GPT faster under torch.compile? Training steps on one rank, in one graph (inductor).

    OMP_NUM_THREADS=1 python benchmarks/compiled.py
    OMP_NUM_THREADS=1 python benchmarks/compiled.py --device cuda --dtype bfloat16 --mode reduce-overhead

A step has forward, loss with balance loss, and backward. Every second block has an MoE layer. `dense` is a dense model
of equal active FLOPs. Eager and compiled steps alternate, and times are medians. On a CPU they are processor time of
all threads, which other work on the machine disturbs least. The first compiled step, which compiles, is wall-clock
time. bfloat16 runs under autocast.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from turnout.models import GPT, GPTConfig
from turnout.models.loss import next_token_loss
from turnout.moe import Capacity, aux_loss

MODELS = {
    "dense": {"moe_every": 0},
    "ragged": {},
    "padded": {"moe": {"capacity": Capacity(1.25, pad=True)}},
}


def measure(name: str, args: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds of an eager step, of a compiled step, and of the first compiled step."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    size = {"dim": args.dim, "layers": args.layers, "heads": 4, "hidden": args.hidden, "seq_len": args.seq_len}
    model = GPT(GPTConfig(**size, **MODELS[name])).to(args.device)
    ids = torch.randint(256, (args.batch, args.seq_len + 1), device=args.device)
    dtype = getattr(torch, args.dtype)

    def step(forward: Callable) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad()
            with torch.autocast(args.device, dtype, enabled=dtype != torch.float32):
                loss = next_token_loss(forward(ids[:, :-1]), ids[:, 1:]) + aux_loss(model)
            loss.backward()
            if args.device == "cuda":
                torch.cuda.synchronize()

        return run

    plain, compiled = step(model), step(torch.compile(model, fullgraph=True, mode=args.mode))
    plain()
    start = time.perf_counter()
    compiled()
    first = time.perf_counter() - start
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    times: dict[Callable, list[float]] = {plain: [], compiled: []}
    for _ in range(1 + args.rounds):
        for run, seconds in times.items():
            start = clock()
            run()
            seconds.append(clock() - start)
    medians = (statistics.median(seconds[1:]) for seconds in times.values())
    return *medians, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mode", help="of torch.compile")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {args.rounds} rounds\n")
    columns = "model", "dtype", "as it is ms", "compiled ms", "compiled / as it is", "first step s"
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for name in args.models:
        plain, ours, first = measure(name, args)
        cells = [name, args.dtype, f"{plain * 1e3:.1f}", f"{ours * 1e3:.1f}", f"{ours / plain:.2f}", f"{first:.0f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
