"""Speed of encode and decode against a copy of as many bytes, and of router and plan in microseconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from gpu_clock import Clock, Run
from gpu_report import Row
from torch import Tensor
from turnout.dispatch import Plan, decode, encode
from turnout.moe.gates import TopKGate

# T, D, E, k of encode and decode; T, D, E, k of the router
SHAPES = [(32768, 4096, 128, 8), (16384, 2048, 64, 8), (8192, 4096, 8, 2)]
ROUTER = [(32768, 4096, 128, 8), (16384, 2048, 64, 8), (8192, 4096, 8, 2), (4096, 2048, 256, 8)]
SMALL = [(64, 16, 4, 2)]
COPY_SHARE = 0.85  # target for encode and decode: this share of the copy's bandwidth
ROUTER_US = 60  # target for router and plan together at the first shape, in microseconds


def cases(clock: Clock, small: bool) -> dict[str, Callable[[], list[Row]]]:
    shapes, routers = (SMALL, SMALL) if small else (SHAPES, ROUTER)
    named = {f"move {shape}": partial(move, clock, *shape) for shape in shapes}
    return {"ceilings": partial(ceilings, clock, small), **named} | {
        f"route {shape}": partial(route, clock, *shape, target=None if i or not clock.cuda else ROUTER_US)
        for i, shape in enumerate(routers)
    }


def ceilings(clock: Clock, small: bool) -> list[Row]:
    """Bandwidth of a copy and speed of one large matrix product on this machine."""
    n, side = (1 << 16, 64) if small else (1 << 32, 8192)
    source = torch.ones(n // 2, device=clock.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=clock.device, dtype=torch.bfloat16)
    b = torch.randn(side, side, device=clock.device, dtype=torch.bfloat16)
    amounts = {f"copy of {n / 2**30:.3g} GiB": ("GB/s", 2 * n / 1e9, lambda: target.copy_(source))}
    amounts[f"bfloat16 product of {side}^3"] = ("TFLOP/s", 2 * side**3 / 1e12, lambda: a @ b)
    times = clock.measure({name: run for name, (_, _, run) in amounts.items()})
    rows: list[Row] = []
    for name, (unit, amount, _) in amounts.items():
        seconds = times[name]
        failed = isinstance(seconds, str)
        rows.append({"what": name, **({"error": seconds} if failed else {"ms": seconds * 1e3, unit: amount / seconds})})
    return rows


def move(clock: Clock, T: int, D: int, E: int, k: int, dtype: torch.dtype = torch.bfloat16) -> list[Row]:
    """Times of encode and decode. GB/s count the least traffic: each input read once, each output written once."""
    g = torch.Generator(clock.device).manual_seed(0)
    plan = Plan.of(torch.rand(T, E, device=clock.device, generator=g).topk(k).indices, E)
    x = torch.randn(T, D, device=clock.device, dtype=dtype, generator=g)
    rows = torch.randn(T * k, D, device=clock.device, dtype=dtype, generator=g)
    weight = torch.rand(T, k, device=clock.device, generator=g)
    one_way = (T + T * k) * D * x.element_size()
    source = torch.empty(one_way // 2, device=clock.device, dtype=torch.int8)
    target = torch.empty_like(source)
    graph_rows, graph_weight = rows.clone().requires_grad_(), weight.clone().requires_grad_()
    decoded = decode(graph_rows, plan, graph_weight)
    home = torch.zeros_like(x)
    runs: dict[str, tuple[int, Run]] = {
        "copy": (one_way, lambda: target.copy_(source)),
        "encode": (one_way, lambda: encode(x, plan)),
        "index_select": (one_way, lambda: x.index_select(0, plan.token)),
        "decode": (one_way, lambda: decode(rows, plan)),
        "gather and sum": (one_way, lambda: rows[plan.slot].sum(1)),
        "index_add": (one_way, lambda: home.zero_().index_add_(0, plan.token, rows)),
        "decode, weighted": (one_way, lambda: decode(rows, plan, weight)),
        "decode, weighted: backward": (
            (T + 2 * T * k) * D * x.element_size(),
            lambda: torch.autograd.grad(decoded, (graph_rows, graph_weight), x, retain_graph=True),
        ),
    }
    times = clock.measure({name: run for name, (_, run) in runs.items()}, queued=True)
    copied = times["copy"]
    if isinstance(copied, str):
        raise RuntimeError(f"the copy failed: {copied}")
    result = []
    for name, (count, _) in runs.items():
        row: Row = {"T, D, E, k": f"{T}, {D}, {E}, {k}", "operation": name, "MB at least": count / 1e6}
        result.append(row)
        seconds = times[name]
        if isinstance(seconds, str):
            row["error"] = seconds
            continue
        share = copied / seconds * count / one_way
        row |= {"ms": seconds * 1e3, "GB/s": count / 1e9 / seconds, "of the copy": share}
        if clock.cuda and name in ("encode", "decode"):
            row[f">= {COPY_SHARE}"] = share >= COPY_SHARE
    return result


def route(clock: Clock, T: int, D: int, E: int, k: int, target: float | None = None) -> list[Row]:
    """Times of router and plan from logits, and of the router's product. `plain` is the same in plain PyTorch."""
    g = torch.Generator(clock.device).manual_seed(0)
    x = torch.randn(T, D, device=clock.device, dtype=torch.bfloat16, generator=g)
    logits = torch.randn(T, E, device=clock.device, generator=g)
    gate, product = Given(E, E, k).to(clock.device), TopKGate(D, E, k).to(clock.device)
    expert = gate(logits).expert
    runs: dict[str, Run] = {
        "router": lambda: gate(logits),
        "plan": lambda: Plan.of(expert, E),
        "router + plan": lambda: Plan.of(gate(logits).expert, E),
        "plain": lambda: plain(logits, k),
        "router's product": lambda: product.logits(x),
    }
    result = []
    with torch.no_grad():
        device_times, times = clock.measure(runs, queued=True), clock.measure(runs)
        for name, run in runs.items():
            row: Row = {"T, E, k": f"{T}, {E}, {k}", "what": name}
            result.append(row)
            own, called = device_times[name], times[name]
            if isinstance(own, str) or isinstance(called, str):
                row["error"] = own if isinstance(own, str) else called
                continue
            row |= {"device us": own * 1e6, "as called us": called * 1e6}
            row |= {"host us": clock.host_us(run), "launches": clock.launches(run)}
            if target and name == "router + plan":
                row[f"< {target} us"] = own * 1e6 < target
    return result


class Given(TopKGate):
    """Top-k gate that takes logits as its input."""

    def logits(self, x: Tensor) -> Tensor:
        return x


def plain(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Router and plan in plain PyTorch: weight and token of each row, number of rows of each expert."""
    weight, expert = logits.softmax(-1).topk(k)
    weight = weight / weight.sum(-1, keepdim=True)
    order = expert.flatten().argsort(stable=True)
    counts = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    counts.scatter_add_(0, expert.flatten(), torch.ones_like(expert.flatten()))
    return weight.flatten()[order], order // k, counts
