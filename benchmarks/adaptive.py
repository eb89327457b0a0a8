"""Tokens to weights, or weights to tokens: how long does a layer take by each choice, and by `Adaptive`?

    python benchmarks/cluster/emulate.py --nodes 4 --ranks 1 --rate 100mbit --delay 0.2ms -- \\
        benchmarks/adaptive.py --capacity 0.5 1 2 4 8 --out adaptive.jsonl           # 25 cases, about 5 minutes
    python benchmarks/cluster/emulate.py ... -- benchmarks/adaptive.py --skewed --out adaptive.jsonl     # 9 cases
    python benchmarks/adaptive.py --report adaptive.jsonl                           # the tables, in markdown
    torchrun --nproc-per-node 4 benchmarks/adaptive.py --capacity 1                 # no limited link: copies alone

One layer on W ranks, from E = W / 4 experts (on a mesh "ep" x "etp") to 4 W. With --capacity, tokens choose evenly and
every expert is padded up to its capacity, so that rows grow with the factor. With --skewed, tokens choose as in a run
of the main job (`record_routing.py`), and nothing is dropped. Static choices and `Adaptive` run in turn in each round,
forward and backward, after steps in which `Adaptive` tries what it wants to try. Times are medians over rounds, of the
slowest rank, after a barrier. Each case is one line in --out, so that a run can be made in pieces (--experts,
--capacity, --tokens).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import OverlapDispatcher
from turnout.moe import Adaptive, Capacity, MoE, Routing, parallelize, param_groups, plan_placement

TRACES = Path(__file__).parent / "data" / "routing.npz"
EVERY, SETTLES = 4, 21  # steps between two decisions; the most decisions until a choice stays


def drawn(tokens: int, E: int, k: int) -> Tensor:
    """k different experts for each token, evenly: int64 [T, k]."""
    g = torch.Generator().manual_seed(dist.get_rank())
    return torch.rand(tokens, E, generator=g).topk(k).indices


def traced(tokens: int, E: int) -> Tensor:
    """This rank's part of a recorded batch of the last layer, repeated if it is too short: int64 [T, k]."""
    with np.load(TRACES) as traces:
        last = max((n for n in traces if n.startswith(f"experts {E},")), key=lambda name: int(name.split()[-1]))
        ids = torch.from_numpy(traces[last][-1]).long()
    first = len(ids) // dist.get_world_size() * dist.get_rank()
    return ids[(torch.arange(tokens) + first) % len(ids)]


def routing_of(expert: Tensor, E: int) -> Routing:
    """Equal weights for these experts."""
    weight = torch.full(expert.shape, 1 / expert.shape[1])
    return Routing(expert, weight, torch.full((len(expert), E), 1 / E))


def slowest(seconds: float) -> float:
    longest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return longest.item()


def once(layer: MoE, x: Tensor, routing: Routing, adaptive: Adaptive | None = None) -> float:
    """Seconds of forward and backward, and of a decision if it falls into this step."""
    dist.barrier()
    start = time.perf_counter()
    layer(x, routing=routing).sum().backward()
    if adaptive is not None:
        adaptive.step()
    return slowest(time.perf_counter() - start)


def statics(slices: int, E: int, skewed: bool) -> dict[str, tuple[int, int, int]]:
    """Static choices by name: r, number of shadowed experts, chunks."""
    ranks = {r: (r, 0, 1) for r in range(slices + 1) if r == 0 or slices % r == 0}
    found = {f"r={r}": choice for r, choice in ranks.items()}
    if slices == 1:
        found["r=1 in 2"] = (1, 0, 2)
    if skewed:
        found |= {f"r={slices}, {n} shadowed": (slices, n, 1) for n in (1, 2, 4) if n < E}
    return found


def measure(E: int, tokens: int, capacity: float | None, args: argparse.Namespace) -> dict[str, Any]:
    """Times of all choices for one case."""
    W = dist.get_world_size()
    slices, k = max(W // E, 1), min(args.top_k, max(E // 2, 1))
    mesh = init_device_mesh("cpu", (W // slices, slices), mesh_dim_names=("ep", "etp"))
    limit = None if capacity is None else Capacity(capacity, pad=True)
    options = {"top_k": k, "balance": 0.0, "seed": 0, "capacity": limit}
    mesh = mesh if slices > 1 else mesh["ep"]
    static = parallelize(MoE(args.dim, args.hidden, E, **options), mesh, "flat")
    dispatcher = static.dispatcher
    auto = parallelize(MoE(args.dim, args.hidden, E, **options), mesh, parallelism="auto")
    optimizer = torch.optim.SGD(param_groups(auto), lr=0.0) if capacity is None else None  # with it, experts may move
    adaptive = Adaptive(auto, mesh, optimizer, every=EVERY)
    expert = traced(tokens, E) if capacity is None else drawn(tokens, E, k)
    routing, x = routing_of(expert, E), torch.randn(tokens, args.dim, requires_grad=True)
    load = torch.bincount(expert.flatten(), minlength=E)
    dist.all_reduce(load)
    hottest = load.argsort(descending=True, stable=True).tolist()

    (inner,) = adaptive._layers.values()
    tries = 0
    while tries < EVERY * SETTLES and not (inner.decisions and inner.decisions.settled):  # alike on all ranks
        once(auto, x, routing, adaptive)
        tries += 1
    choices = statics(slices, E, capacity is None)
    seconds: dict[str, list[float]] = {name: [] for name in (*choices, "auto")}
    for counted in [False, *[True] * args.rounds]:
        for name, (r, hot, chunks) in choices.items():
            static.parallelism, static.shadow = r, hottest[:hot] or None
            static.dispatcher = dispatcher if chunks == 1 else OverlapDispatcher(dispatcher, chunks)
            took = once(static, x, routing)
            seconds[name] += [took] if counted else []
        took = once(auto, x, routing, adaptive)
        seconds["auto"] += [took] if counted else []
    assert inner.load is not None
    predicted = {n: inner.costs.predict(inner.load, [r], [hot], ["flat"], [c]) for n, (r, hot, c) in choices.items()}

    def uneven(order: Sequence[int]) -> float:
        ranks = load[list(order)].view(W // slices, -1).sum(1).double()
        return float(ranks.max() / ranks.mean())

    return {
        **{"experts": E, "ranks": W, "tokens": tokens, "capacity": capacity, "load": load.tolist()},
        "chosen": str(adaptive.reports[""].choice),
        "tries": tries,  # steps until the choice stayed
        "imbalance": uneven(range(E)),  # largest load of a rank over the mean, without and with placement
        "placed": uneven(auto.experts.order),
        "planned": uneven(plan_placement(load, W // slices).order),
        "ms": {name: 1e3 * statistics.median(times) for name, times in seconds.items()},
        "predicted": {name: 1e3 * next(iter(found.values())) for name, found in predicted.items()},
    }


def told(case: dict[str, Any], name: str) -> str:
    """Measured milliseconds, and in brackets what is predicted."""
    predicted = f" ({case['predicted'][name]:.0f})" if name in case["predicted"] else ""
    return f"{case['ms'][name]:.0f}{predicted}" if name in case["ms"] else ""


def table(cases: list[dict[str, Any]]) -> str:
    """The cases as markdown, and how far `Adaptive` is from the best, the worst and plain expert parallelism."""
    names = list(dict.fromkeys(name for case in cases for name in case["ms"]))
    kind = "capacity" if cases[0]["capacity"] else "rank load, largest / mean: at first / chosen / planned"
    lines = [f"| E / W | tokens | {kind} | {' | '.join(names)} | auto chose | auto / best |"]
    lines.append("|" + "---|" * (len(names) + 5))
    for case in cases:
        best = min(t for name, t in case["ms"].items() if name != "auto")
        times = [told(case, name) for name in names]
        uneven = (f"{case[name]:.2f}" for name in ("imbalance", "placed", "planned"))
        kind = f"{case['capacity']:g}" if case["capacity"] else " / ".join(uneven)
        ratio = case["ms"]["auto"] / best
        lines.append(
            f"| {case['experts']} / {case['ranks']} | {case['tokens']} | {kind} | {' | '.join(times)} | "
            f"{case['chosen']} | {ratio:.2f} |"
        )
    ms = [{**case["ms"]} for case in cases]
    autos = [each.pop("auto") for each in ms]
    ratios = [auto / min(each.values()) for auto, each in zip(autos, ms, strict=True)]
    worst = statistics.median(max(each.values()) / auto for auto, each in zip(autos, ms, strict=True))
    plain = [
        each.get("r=1", 0) / auto for auto, each, case in zip(autos, ms, cases, strict=True) if not case["capacity"]
    ]
    lines += ["", f"auto / best: at most {max(ratios):.2f}, median {statistics.median(ratios):.2f}; "
              f"worst / auto: median {worst:.2f}"]  # fmt: skip
    lines += [f"r = 1 / auto on recorded routings: median {statistics.median(plain):.2f}"] if plain else []
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--experts", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 4], help="E / W")
    parser.add_argument("--tokens", type=int, nargs="+", help="of each rank (512; skewed: 256 1024 4096)")
    parser.add_argument("--capacity", type=float, nargs="+", default=[], help="factors, padded, for even routing")
    parser.add_argument("--skewed", action="store_true", help="recorded routings, dropless")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file to append the cases to")
    parser.add_argument("--report", type=Path, help="print the tables of such a file, and measure nothing")
    args = parser.parse_args()
    if args.report:
        cases = [json.loads(line) for line in args.report.read_text().splitlines()]
        for part in ([c for c in cases if c["capacity"]], [c for c in cases if not c["capacity"]]):
            print(table(part) + "\n" if part else "", end="")
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    W = dist.get_world_size()
    cases = [(round(ratio * W), T, c) for c in args.capacity for ratio in args.experts for T in args.tokens or [512]]
    if args.skewed:
        recorded = [ratio for ratio in args.experts if ratio >= 1]
        cases += [(round(ratio * W), T, None) for ratio in recorded for T in args.tokens or [256, 1024, 4096]]
    for E, tokens, capacity in cases:
        case = measure(E, tokens, capacity, args)
        if not dist.get_rank():
            print(json.dumps(case), flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(case) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
