"""Run the experts' Triton kernels, forward and backward, and save what went in and came out.

    TRITON_INTERPRET=1 python run_experts.py results.pt            on a CPU, by Triton's interpreter
    python run_experts.py results.pt --device cuda

A process of its own: Triton asks for its interpreter when it is first imported.
"""

from __future__ import annotations

import argparse
import logging
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from turnout.cuda.tiles import MEASURED, Product
from turnout.dispatch import OverlapDispatcher, Plan
from turnout.dispatch.reorder import encode_weight
from turnout.moe import MoE
from turnout.moe.autotune import Tuning, autotune
from turnout.moe.experts import first_use as first
from turnout.moe.experts.activation import ACTIVATIONS
from turnout.moe.experts.triton_path import fused

NAN = float("nan")
WAYS = ("plain", "overlapped", "compiled")
E = 4


@dataclass(frozen=True)
class Case:
    """Tokens of which `expert` [T, k] tells the experts; without `plan` rows that lie sorted already."""

    expert: list[list[int]]
    activation: str = "swiglu"
    dtype: torch.dtype = torch.float32
    capacity: int | None = None
    plan: bool = True
    bias: bool = False
    sizes: tuple[int, int] = (24, 8)  # D, H; tiles are 16 wide under the interpreter
    descriptors: bool = True  # where the tables say so
    scale: float = 0.2  # of weights


RAGGED = [[0, 2], [2, 3], [2, -1], [2, 0], [-1, -1], [3, 2]] * 3  # nobody goes to 1; 12 rows to 2, 4 to 0, 5 to 3
CASES = {
    "ragged": Case(RAGGED, sizes=(24, 40)),
    "padded": Case(RAGGED[:6], "gelu", capacity=7),
    "all on one": Case([[3]] * 37, "relu"),
    "nothing": Case([[-1]] * 3),
    "sorted rows": Case(RAGGED[:9], plan=False),
    "sorted rows, gelu": Case(RAGGED[:6], "gelu", plan=False),
    "sorted rows, gelu_tanh": Case(RAGGED[:6], "gelu_tanh", plan=False),
    "float16": Case(RAGGED[:6], dtype=torch.float16),
    "biases": Case(RAGGED[:9], bias=True),
    "biases, padded": Case(RAGGED[:6], "gelu", capacity=7, bias=True, sizes=(24, 40)),
    "biases, sorted rows": Case([[0]] * 5 + [[2]] * 20 + [[-1]] * 2, "relu", plan=False, bias=True),
    "odd sizes": Case(RAGGED[:6], bias=True, sizes=(23, 17)),  # no multiples of 16 bytes
    "odd sizes, sorted rows": Case(RAGGED[:6], plan=False, sizes=(23, 17)),
    "by pointer": Case(RAGGED[:9], descriptors=False, sizes=(24, 40)),
    "by pointer, biases, sorted rows": Case(RAGGED[:9], descriptors=False, bias=True, plan=False, sizes=(24, 40)),
}
CASES |= {kind: Case(RAGGED[:9], kind, bias=True, plan=False, scale=3.0) for kind in ACTIVATIONS}
MANY_ROWS = Case([[1]] * 600, "gelu", bias=True, sizes=(8, 8))  # bfloat16 cannot count to 600
BFLOAT16 = {
    f"{name}, bfloat16": replace(case, dtype=torch.bfloat16)
    for name, case in (CASES | {"many rows": MANY_ROWS}).items()
    if case.dtype == torch.float32
}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def descriptors(wanted: bool):
    """Let kernels load through tensor descriptors, or by pointer alone."""
    from turnout.cuda import grouped

    chosen = grouped.blocks
    if not wanted:
        grouped.blocks = lambda *given: chosen(*given)._replace(descriptors=False)
    try:
        yield
    finally:
        grouped.blocks = chosen


def run(case: Case, device: str) -> dict:
    plan = Plan.of(torch.tensor(case.expert), E, case.capacity)
    rows = len(plan.token) if not case.plan else len(case.expert)
    D, H = case.sizes
    layers = ["up", "gate", "down"] if ACTIVATIONS[case.activation].gated else ["up", "down"]
    shapes = {"w_up": (E, D, H), "w_gate": (E, D, H), "w_down": (E, H, D)}
    shapes |= {"b_up": (E, H), "b_gate": (E, H), "b_down": (E, D)}
    names = [f"{kind}_{layer}" for kind in ("wb" if case.bias else "w") for layer in layers]
    given = {
        "x": random(rows, D, seed=1),
        **{n: random(*shapes[n], seed=2 + i) * case.scale for i, n in enumerate(names)},
    }
    given = {name: t.to(case.dtype) for name, t in given.items()}
    weight = random(*plan.slot.shape, seed=8).abs()
    weight = weight if case.plan else encode_weight(weight, plan)
    grad = random(rows, D, seed=9).to(case.dtype)
    if not case.plan:
        for t in (given["x"], grad, weight):
            t[int(plan.counts.sum()) :] = NAN  # rows of nobody
    leaves = {n: t.to(device).requires_grad_() for n, t in {**given, "weight": weight}.items()}
    on_device = Plan(*(t.to(device) for t in (plan.expert, plan.token, plan.slot, plan.counts)), plan.capacity)
    *ups, down = ((leaves[f"w_{layer}"], leaves.get(f"b_{layer}")) for layer in layers)
    way = (case.activation, ups, down, on_device if case.plan else None)
    with descriptors(case.descriptors):
        y = fused(leaves["x"], leaves["weight"], on_device.counts, *way)
        grads = torch.autograd.grad(y, list(leaves.values()), grad.to(device))
    grads = {name: g.cpu() for name, g in zip(leaves, grads, strict=True)}
    if case.plan:
        weight, grads["weight"] = (encode_weight(t, plan) for t in (weight, grads["weight"]))
    return {
        "given": {**given, "weight": weight},
        "activation": case.activation,
        "token": plan.token if case.plan else None,
        "counts": plan.counts,
        "grad": grad,
        "y": y.detach().cpu(),
        "grads": grads,
    }


def layer(kernel: str, device: str, way: str) -> list[torch.Tensor]:
    """A whole layer: output and gradients; "compiled", if on Triton's kernels."""
    torch.manual_seed(0)
    moe = MoE(16, 24, 3, 2, capacity=1.0, bias=way == "plain", seed=1).to(device)
    moe.experts.kernel = kernel
    if way == "overlapped":  # rows come sorted then
        moe.dispatcher = OverlapDispatcher(moe.dispatcher, 2)
    x = random(2, 4, 16, seed=3).to(device).requires_grad_()
    compiles = way == "compiled" and kernel == "triton"
    y = (torch.compile(moe, backend="aot_eager", fullgraph=True) if compiles else moe)(x)
    y.square().mean().backward()
    return [t.detach().cpu() for t in (y, x.grad, *(p.grad for p in moe.parameters()))]


def frozen(device: str) -> list[torch.Tensor]:
    """The output without and with a graph, and the gradient of x alone: as with everything, computed first."""
    torch.manual_seed(0)
    moe = MoE(16, 16, 2, 1, experts="relu", seed=1).to(device)
    moe.experts.kernel = "triton"
    x = random(3, 16, seed=3).to(device).requires_grad_()
    y = moe(x)
    (everything,) = torch.autograd.grad(y.sum(), x)
    moe.requires_grad_(False)
    again = moe(x)
    again.sum().backward()
    with torch.no_grad():
        without = moe(x)
    return [t.detach().cpu() for t in (y, again, without, everything, x.grad)]


def check_operator(device: str) -> str:
    plan = Plan.of(torch.tensor([[1], [0], [1]], device=device), 2)
    x, weight, w = random(3, 16, seed=0), torch.ones(3), random(2, 16, 16, seed=1)
    x, weight, w = (t.to(device).requires_grad_() for t in (x, weight, w))
    ends = plan.counts.cumsum(0).to(torch.int32)
    other = w.detach().clone().requires_grad_()
    bias = random(2, 16, seed=2).to(device).requires_grad_()
    tensors = (x, weight, ends, plan.token, plan.slot, w, None, other, bias, None, bias.detach().clone())
    torch.library.opcheck(torch.ops.turnout.experts.default, (*tensors, "relu", True, "triton"))
    return "well formed"


def tuned(device: str, sorted_rows: bool) -> dict:
    """A layer before and after `autotune`, what that has measured, and whether each product then has such tiles.

    Under the interpreter by a clock for which what comes later is faster: no default is left.
    """
    from turnout.cuda import grouped

    moe = MoE(16, 24, 3, 2, experts="gelu" if sorted_rows else "swiglu", seed=1).to(device)
    if sorted_rows:
        moe.dispatcher = OverlapDispatcher(moe.dispatcher, 1)
    x = random(5, 16, seed=3).to(device).requires_grad_()
    before, asked, blocks, turn = step(moe, x), [], grouped.blocks, 0

    def clock(run) -> float:
        nonlocal turn
        run()
        turn += 1
        return 1.0 / turn

    def watched(*given):
        asked.append(Product.of(*given) in MEASURED)
        assert blocks(*given) == MEASURED.get(Product.of(*given))
        return blocks(*given)

    said: Tuning = autotune(moe, len(x), clock=clock if device == "cpu" else None)
    chosen = moe.experts.kernel
    moe.experts.kernel = "triton"
    grouped.blocks = watched
    after = step(moe, x)
    grouped.blocks = blocks
    (measured,) = said.experts
    tiles = {product.kernel + str(product.shape): times for product, times in measured.tiles.items()}
    tiles = {name: {tuple(size): ms for size, ms in times.items()} for name, times in tiles.items()}
    return {
        "before": before,
        "after": after,
        "chosen": chosen,
        "times": measured.times,
        "tiles": tiles,
        "asked": asked,
        "shape": tuple(measured.shape),
        "text": str(said),
    }


def cuts(device: str) -> list[tuple]:
    """Rows cut into tiles: ends, number of rows, size of a tile, and the expert and first row of each tile."""
    from turnout.cuda.grouped import Groups

    made = []
    for ends in ([3, 3, 8], [0, 0, 0], [0, 16, 16], [5], [1, 2, 3, 4], list(range(0, 800, 4))):
        for size in (1, 4, 16):
            for spare in (0, 3):
                groups = Groups(torch.tensor(ends, dtype=torch.int32, device=device), ends[-1] + spare)
                assert groups.tiles(size) is groups.tiles(size)
                made.append((ends, groups.rows, size, *(t.tolist() for t in groups.tiles(size)[:2])))
    return made


def first_use(device: str) -> dict:
    """What the check at first use finds, and what a layer then computes: with right kernels, wrong ones, and none."""
    from turnout.cuda import grouped

    class Said(logging.Handler):
        def emit(self, record):
            texts.append(record.getMessage())

    found, down = {}, grouped.down
    logging.getLogger("turnout.moe.experts.first_use").addHandler(Said())

    def refused(*_, **__):
        raise RuntimeError("out of shared memory")

    def wrong(pairs, *given, transposed=False, **named):  # one of the two products of the backward is lost
        return down(pairs[:1], *given, transposed=transposed, **named)

    for name, replaced in (("right", down), ("wrong", wrong), ("refused", refused)):
        grouped.down, texts = replaced, []
        first.forget()
        moe = MoE(16, 24, 3, 2, bias=True, seed=1).to(device)
        moe.experts.kernel = "triton"
        x = random(5, 16, seed=3).to(device).requires_grad_()
        results = [step(moe, x) for _ in range(2)]
        moe.experts.kernel = "torch"
        found[name] = {"texts": texts, "results": results, "torch": step(moe, x)}
    grouped.down = down
    first.forget()
    kind = first.Kind(x.device, torch.float32, 16, 24, "gelu", bias=False, many=False, gathers=False)
    return found | {"sorted": first.differences(kind)}


def step(moe: MoE, x: torch.Tensor) -> list[torch.Tensor]:
    y = moe(x)
    return [t.detach().cpu() for t in (y, *torch.autograd.grad(y.square().sum(), [x, *moe.experts.parameters()]))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("results")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cpu":
        import interpreter

        interpreter.repair()
    results = {"cases": {name: run(case, device) for name, case in (CASES | BFLOAT16).items()}}
    results["layers"] = {way: [layer(kernel, device, way) for kernel in ("torch", "triton")] for way in WAYS}
    results["frozen"] = frozen(device)
    results["operator"] = check_operator(device)
    results["cuts"] = cuts(device)
    results["first use"] = first_use(device)
    results["tuned"] = {name: tuned(device, name == "sorted") for name in ("gathered", "sorted")}
    torch.save(results, arguments.results)
