"""First look at a GPU, in 90 seconds: do the kernels run, are they right, how fast is each against its floor?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import gpu_checks
import gpu_floors
import torch
from gpu_clock import Clock, Run
from gpu_layer import SHAPES, SMALL, Shape, has_float8, kernels
from gpu_report import Row
from turnout.cuda import tune
from turnout.dispatch import Plan, decode
from turnout.moe.experts import first_use
from turnout.moe.gates import TopKGate

LATE = 1.25  # a kernel is late beyond this multiple of its expected time


def cases(clock: Clock, small: bool) -> dict[str, Callable[[], list[Row]]]:
    """Correctness first, then times, with a case for each group of kernels that may fail by itself."""
    shape, device = (SMALL if small else SHAPES)[0], clock.device
    T, D, E, k = (40, 16, 4, 2) if small else (1000, 256, 16, 4)
    named: dict[str, Callable[[], list[Row]]] = {
        "ops bfloat16": partial(gpu_checks.operators, device, torch.bfloat16, T, D, E, k),
        "plan": partial(gpu_checks.plans, device, T, E, k),
        "router": partial(gpu_checks.router, device, T, E, k),
    }
    if "triton" in kernels(device):
        named["experts"] = partial(experts, device, shape)
    named["times of routing"] = partial(times, clock, shape, routing)
    if "triton" in kernels(device):
        named["times of experts"] = partial(times, clock, shape, products)
        if has_float8(device):
            named["experts float8"] = partial(experts, device, shape, "fp8")
            named["times of experts, float8"] = partial(times, clock, shape, float8_products)
    return named


def experts(device: torch.device, shape: Shape, precision: str | None = None) -> list[Row]:
    """Errors of the Triton kernels at the sizes of the shape, against plain PyTorch on the same GPU.

    In float8 plain PyTorch rounds the same operands, so that the tolerance is the same.
    """
    _, D, H, _, _ = shape
    result: list[Row] = []
    for dtype in (torch.bfloat16,) if precision else (torch.bfloat16, torch.float16):
        for gathers in (True, False):
            kind = first_use.Kind(device, dtype, D, H, "swiglu", False, True, gathers, precision)
            for name, error in first_use.differences(kind).items():
                limit = first_use.TOLERANCE[dtype]
                row: Row = {"check": name, "dtype": str(dtype).removeprefix("torch."), "gathers": gathers}
                result.append(row | {"error": error, "tolerance": limit, "ok": error <= limit})
    return result


def times(clock: Clock, shape: Shape, make: Callable[[torch.device, Shape], dict[str, Run]]) -> list[Row]:
    """Device time of each kernel beside its floor and expected time, if the rates of the GPU are known."""
    works = gpu_floors.works(shape) | gpu_floors.float8_works(shape)
    name = torch.cuda.get_device_properties(clock.device).name if clock.cuda else "cpu"
    rates = gpu_floors.device(name)
    result: list[Row] = []
    for kernel, seconds in clock.measure(make(clock.device, shape), queued=True).items():
        row: Row = {"T, D, H, E, k": ", ".join(map(str, shape)), "what": kernel}
        result.append(row)
        if isinstance(seconds, str):
            row["error"] = seconds
            continue
        work, ms = works[kernel], seconds * 1e3
        row |= {"ms": ms, "GB/s": work.gb / seconds, "TFLOP/s": work.tflop / seconds or None}
        if rates is not None:
            floor, expected = work.floor(rates), work.expected(rates)
            row |= {"floor ms": floor, "of the floor": floor / ms, "expected ms": expected}
            row[f"<= {LATE} x expected"] = ms <= LATE * expected
    return result


def routing(device: torch.device, shape: Shape) -> dict[str, Run]:
    """Router, plan and decode, as functions that run them."""
    T, D, _, E, k = shape
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(T, D, generator=g, device=device).bfloat16().requires_grad_()
    gate, given = TopKGate(D, E, k).to(device, torch.bfloat16), Given(E, E, k).to(device)
    logits = gate.logits(x)
    free = logits.detach().requires_grad_()
    routing = given(free)
    plan = Plan.of(routing.expert, E)
    rows = torch.randn(len(plan.token), D, generator=g, device=device).bfloat16()
    to_logits, to_weight = torch.ones_like(logits), torch.ones_like(routing.weight)
    inputs, no_grad = [x, gate.weight], torch.no_grad()
    return {
        "router, product": no_grad(lambda: gate.logits(x)),
        "router": no_grad(lambda: given(free)),
        "plan": lambda: Plan.of(routing.expert, E),
        "decode": lambda: decode(rows, plan),
        "router, backward": lambda: torch.autograd.grad(routing.weight, free, to_weight, retain_graph=True),
        "router, product, backward": lambda: torch.autograd.grad(logits, inputs, to_logits, retain_graph=True),
    }


def products(device: torch.device, shape: Shape) -> dict[str, Run]:
    """Grouped GEMMs with their default tile sizes, as functions that run them."""
    T, D, H, E, k = shape
    sizes = tune.Shape(T, D, H, E, k, activation="swiglu", bias=False, dtype="bfloat16", gathers=True, gated=True)
    return {
        name: partial(run, None)
        for name, run in zip(
            ("up", "down", "down, backward", "hidden, backward", "weight, backward", "weights, backward"),
            tune.runs(sizes, device),
            strict=True,
        )
    }


def float8_products(device: torch.device, shape: Shape) -> dict[str, Run]:
    """Products in float8 and the casts before them, as functions that run them."""
    from turnout.cuda import scaling

    T, D, H, E, k = shape
    kinds = {"activation": "swiglu", "bias": False, "dtype": "bfloat16", "gathers": True, "gated": True}
    runs = tune.runs(tune.Shape(T, D, H, E, k, **kinds, precision="fp8"), device)[:4]
    named = zip(("up, float8", "down, float8", "down, backward, float8", "hidden, backward, float8"), runs, strict=True)
    x, w_up, w_down, hidden = (
        torch.randn(*size, device=device, dtype=torch.bfloat16) for size in ((T, D), (E, D, H), (E, H, D), (T * k, H))
    )
    return {name: partial(run, None) for name, (_, run) in named} | {
        "cast of tokens": partial(scaling.rows, x),
        "cast of columns, up": partial(scaling.columns, w_up),
        "cast of columns, down": partial(scaling.columns, w_down),
        "cast of hidden rows": partial(scaling.rows, hidden),
        "cast of rows, down": partial(scaling.matrix_rows, w_down),
        "cast of rows, up": partial(scaling.matrix_rows, w_up, w_up),
        "cast of gradients": partial(scaling.rows, hidden, hidden),
    }


class Given(TopKGate):
    """Top-k gate that takes logits as its input."""

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return x
