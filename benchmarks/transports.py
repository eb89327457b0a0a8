"""Which transport is fastest, and how many bytes does each send? Dispatch and combine, forward and backward.

    python benchmarks/transports_report.py           # runs this file on all clusters of docs/records/transports.md
    python benchmarks/cluster/emulate.py --nodes 4 --ranks 2 --rate 100mbit --delay 0.2ms -- benchmarks/transports.py
    torchrun --nnodes 4 --nproc-per-node 8 ... benchmarks/transports.py --interface eth0        # a real cluster

A step is `dispatch`, experts that only multiply by the weight, `combine`, and the backward of all that. A size of B
bytes means tokens of B bytes on each rank, which sends k times as many. All transports run in turn in each round. Times
are medians over rounds, of the slowest rank, after a barrier. Bytes per step come from the network interfaces' counters
and are sums over nodes, with headers and acknowledgements. The results include the transport that `dispatcher="auto"`
chooses after it has measured the same links.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import Dispatcher, FlatDispatcher, HierarchicalDispatcher, NodeDispatcher, OverlapDispatcher, Plan
from turnout.dispatch.autoselect.measure import measure as measure_links
from turnout.dispatch.autoselect.profile import Message
from turnout.dispatch.node import PIECES

EXPERTS = 64
SIZES = [2**10, 2**14, 2**17, 2**20, 2**22, 2**24]


def routing(tokens: int, k: int, skewed: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Random routing: expert [T, k] without repetition, and weight [T, k].

    If skewed, the probability of an expert is proportional to 1 / (its position in a random order of all experts).
    """
    g = torch.Generator().manual_seed(seed)
    share = torch.ones(EXPERTS)
    if skewed:
        place = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(0))  # the same on all ranks
        share = 1 / (1 + place.float())
    noise = -torch.rand(tokens, EXPERTS, generator=g).log()  # the k smallest of noise / share: drawn without repetition
    return (noise / share).topk(k, largest=False).indices, torch.rand(tokens, k, generator=g)


def row_bytes(size: int) -> int:
    """Bytes of a float32 row. Rows are short for small messages, so that there are several."""
    return 256 if size <= 2**14 else 4096


def run_step(dispatcher: Dispatcher, x: Tensor, plan: Plan, weight: Tensor, grad: Tensor) -> None:
    dispatcher(x, plan, weight, lambda rows, weight, counts: rows * weight.unsqueeze(1)).backward(grad)


def messages(fn: Callable[[], None], local: int) -> int:
    """Number of messages to other nodes that are not empty, while fn() runs, over all ranks."""
    sent, exchange = 0, dist.all_to_all_single

    def counting(out, tensor, recv=None, send=None, group=None, **options):
        nonlocal sent
        ranks = dist.get_process_group_ranks(group)
        sizes = [1] * len(ranks) if send is None else send
        sent += sum(size > 0 and to // local != dist.get_rank() // local for to, size in zip(ranks, sizes, strict=True))
        return exchange(out, tensor, recv, send, group=group, **options)

    dist.all_to_all_single = counting  # in this process alone
    fn()
    dist.all_to_all_single = exchange
    return int(total(sent))


def total(value: float, op=dist.ReduceOp.SUM) -> float:
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op)
    return tensor.item()


def sent(interface: str) -> int:
    """Bytes that this node has sent, on its first rank; 0 on its other ranks."""
    if int(os.environ["LOCAL_RANK"]):
        return 0
    with open("/proc/self/net/dev") as counters:
        return next(int(line.split(":")[1].split()[8]) for line in counters if line.strip().startswith(interface + ":"))


def crossing(expert: Tensor, nodes: int, node: int) -> tuple[int, int]:
    """Number of assignments [T, k] to experts of other nodes, and of distinct pairs (token, other node)."""
    home = expert // (EXPERTS // nodes)
    pairs = torch.zeros(len(expert), nodes, dtype=torch.bool).scatter_(1, home, True)
    pairs[:, node] = False
    return int((home != node).sum()), int(pairs.sum())


def measure(
    dispatchers: dict[str, Dispatcher], size: int, k: int, skewed: bool, rounds: int, interface: str, nodes: int
) -> dict[str, dict[str, float]]:
    rank, local = dist.get_rank(), dist.get_world_size() // nodes
    width = row_bytes(size) // 4
    expert, weight = routing(max(1, size // (4 * width)), k, skewed, rank)
    plan = Plan.of(expert, EXPERTS)
    x = torch.randn(len(expert), width, requires_grad=True)
    grad, weight = torch.randn_like(x), weight.requires_grad_()
    rows = [total(n) for n in crossing(expert, nodes, rank // local)]
    found: dict[str, dict] = {}
    for name, dispatcher in dispatchers.items():
        run = (lambda d: lambda: run_step(d, x, plan, weight, grad))(dispatcher)
        count = messages(run, local)
        start = time.perf_counter()
        run()
        once = total(time.perf_counter() - start, dist.ReduceOp.MAX)
        needs = (
            4 * 4 * width * rows[name.startswith("node")]
        )  # float32 rows: dispatch and combine, forward and backward
        found[name] = {"run": run, "steps": max(1, min(20, int(0.2 / once))), "seconds": [], "sent": 0.0}
        found[name] |= {"messages": count, "needs": needs}
    for _ in range(rounds):
        for case in found.values():
            dist.barrier()
            before, start = sent(interface), time.perf_counter()
            for _ in range(case["steps"]):
                case["run"]()
            case["seconds"].append(total((time.perf_counter() - start) / case["steps"], dist.ReduceOp.MAX))
            case["sent"] += total((sent(interface) - before) / case["steps"] / rounds)
    for case in found.values():
        case["seconds"] = statistics.median(case["seconds"])
        del case["run"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes of tokens on each rank")
    parser.add_argument("--k", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--skewed", action="store_true", help="skewed routing; uniform otherwise")
    parser.add_argument("--pieces", action="store_true", help="also node in 4 pieces, and in 4 overlapping chunks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cap", type=float, default=4.0, help="leave out steps predicted to take more seconds")
    parser.add_argument("--interface", default="eth0", help="network interface between the nodes")
    parser.add_argument("--link", default="", help="name of the link, for the results")
    parser.add_argument("--out", help="file to append the results to, one line of JSON per case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = dist.get_world_size() // local
    mesh = init_device_mesh("cpu", (nodes, local), mesh_dim_names=("node", "local"))
    dispatchers = {
        "flat": FlatDispatcher(dist.group.WORLD),  # pyright: ignore[reportArgumentType]
        "2dh": HierarchicalDispatcher.of(mesh),
        "node": NodeDispatcher.of(mesh),
    }
    if args.pieces:
        chunks = OverlapDispatcher(dispatchers["node"], 4)
        dispatchers |= {"node in pieces": NodeDispatcher.of(mesh, pieces=PIECES), "node in chunks": chunks}
    profile = measure_links(mesh)
    for k, size in product(args.k, args.sizes):
        what = f"{nodes}x{local} {args.link} {'skewed' if args.skewed else 'uniform'} k={k} {size} B"
        message = Message(max(1, size // row_bytes(size)), row_bytes(size), k, EXPERTS)
        predicted = profile.predict(message)
        if max(predicted.values()) > args.cap:
            if not dist.get_rank():
                print(f"{what}: left out, about {max(predicted.values()):.0f} s per step", flush=True)
            continue
        found = measure(dispatchers, size, k, args.skewed, args.rounds, args.interface, nodes)
        if not dist.get_rank():
            print(what, *(f"| {n} {c['seconds'] * 1e3:.1f} ms {c['sent'] / 1e6:.2f} MB" for n, c in found.items()))
            if args.out:
                record = {"shape": f"{nodes}x{local}", "link": args.link, "skewed": args.skewed, "k": k}
                record |= {"size": size, "found": found, "chosen": profile.choose(message).transport}
                with open(args.out, "a") as file:
                    file.write(json.dumps(record | {"predicted": predicted}) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
