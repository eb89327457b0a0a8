"""Correctness on a device: operators against the CPU, the layer against float64, repeated runs to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from gpu_layer import kernels
from gpu_report import Row
from torch import Tensor
from turnout.dispatch import Plan, decode, encode
from turnout.moe import Capacity, MoE
from turnout.moe.capacity import drop_over_capacity
from turnout.moe.gates import TopKGate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Tolerances as shares of the largest value: for one rounding of a result, and for a layer's chain of roundings.
ROUNDED = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
CHAINED = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def cases(device: torch.device, small: bool) -> dict[str, Callable[[], list[Row]]]:
    T, D, H, E, k = (40, 16, 24, 4, 2) if small else (1000, 256, 192, 16, 4)
    named: dict[str, Callable[[], list[Row]]] = {}  # the part "first" has bfloat16, the plan and the router
    for dtype in (torch.float32, torch.float16):
        named[f"ops {dtype}"] = partial(operators, device, dtype, T, D, E, k)
    named["large offsets"] = partial(large, device, T if small else 70_000, 16 if small else 4096)
    for kernel in kernels(device):
        for dtype in DTYPES.values():
            named[f"layer {dtype}, {kernel}"] = partial(layer, device, dtype, kernel, T, D, H, E, k)
        named[f"repeated, {kernel}"] = partial(repeated, device, kernel, T, D, H, E, k)
        if device.type == "cuda":
            named[f"no sync, {kernel}"] = partial(unsynchronised, device, kernel, T, D, H, E, k)
            named[f"graph, {kernel}"] = partial(captured, device, kernel, T, D, H, E, k)
    return named


def slow_cases(device: torch.device, small: bool) -> dict[str, Callable[[], list[Row]]]:
    """Slow cases, which run last because time may run out."""
    return {} if small else {"compiled, checked": partial(compiled, device, 1000, 256, 192, 16, 4)}


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected value; infinite for NaN or another shape."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    worst = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    return worst if worst == worst else float("inf")


def row(what: str, actual: Tensor, expected: Tensor, tolerance: float, **more: object) -> Row:
    off = error(actual, expected)
    return {"check": what, **more, "error": off, "tolerance": tolerance, "ok": off <= tolerance}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chosen(T: int, E: int, k: int) -> Tensor:
    """Experts [T, k] of uneven load. An eighth of the assignments and one whole token are dropped."""
    noise = torch.rand(T, E, generator=torch.Generator().manual_seed(3)) * torch.linspace(1, 3, E)
    expert = noise.topk(k).indices
    gone = torch.rand(T, k, generator=torch.Generator().manual_seed(4)) < 1 / 8
    gone[T // 2] = True
    return torch.where(gone, -1, expert)


EXACT = ("encode", "decode: backward")  # these only copy values


def operators(device: torch.device, dtype: torch.dtype, T: int, D: int, E: int, k: int) -> list[Row]:
    """Compare operators in `dtype` on the device with the CPU in float64. Padding rows hold NaN."""
    result = []
    expert = chosen(T, E, k)
    ragged = Plan.of(expert, E)
    layouts = {"ragged": ragged, "padded": ragged.padded(int(ragged.counts.max()) + 3)}
    layouts["k = 1"] = Plan.of(expert[:, :1].contiguous(), E)
    for name, plan in layouts.items():
        tensors = {f.name: getattr(plan, f.name) for f in fields(plan)}
        there = replace(plan, **{f: t.to(device) for f, t in tensors.items() if isinstance(t, Tensor)})
        for width in (D, 24):  # rows of 24 have fewer 16-byte vectors than a warp has threads
            rows = torch.where(plan.token.unsqueeze(1) < 0, torch.nan, drawn(len(plan.token), width, seed=1))
            given = [drawn(T, width, seed=0), rows, drawn(*plan.slot.shape, seed=2).abs()]
            given += [drawn(len(rows), width, seed=5), drawn(T, width, seed=6)]
            given = [t.to(torch.float32 if t is given[2] else dtype) for t in given]
            expected = encode_decode(plan, *(t.double() for t in given))
            ours = encode_decode(there, *(t.to(device) for t in given))
            more = {"dtype": str(dtype).removeprefix("torch."), "plan": name, "D": width}
            for what, value in ours.items():
                result.append(row(what, value, expected[what], 0 if what in EXACT else ROUNDED[dtype], **more))
    return result


def encode_decode(
    plan: Plan, x: Tensor, rows: Tensor, weight: Tensor, to_rows: Tensor, to_y: Tensor
) -> dict[str, Tensor]:
    """Results of encode and decode, and their gradients from gradients of rows and of y."""
    x, rows, weight = (t.detach().requires_grad_() for t in (x, rows, weight))
    encoded, decoded, both = encode(x, plan), decode(rows, plan), decode(rows, plan, weight)
    weighted = torch.autograd.grad(both, (rows, weight), to_y)
    return {
        "encode": encoded,
        "encode: backward": torch.autograd.grad(encoded, x, to_rows)[0],
        "decode": decoded,
        "decode: backward": torch.autograd.grad(decoded, rows, to_y)[0],
        "decode, weighted": both,
        "decode, weighted: of rows": weighted[0],
        "decode, weighted: of weight": weighted[1],
    }


def plans(device: torch.device, T: int, E: int, k: int) -> list[Row]:
    result = []
    experts = {
        "dropping": chosen(T, E, k),
        "one expert": torch.zeros(T, 1, dtype=torch.int64),
        "empty": chosen(T, E, k)[:0],
    }
    experts["nothing kept"] = torch.full((T, k), -1)
    for name, expert in experts.items():
        plan, there = Plan.of(expert, E), Plan.of(expert.to(device), E)
        limit = int(plan.counts.max()) + 1
        for form, a, b in (("ragged", there, plan), ("padded", there.padded(limit), plan.padded(limit))):
            same = all(torch.equal(getattr(a, f).cpu(), getattr(b, f)) for f in ("token", "slot", "counts", "expert"))
            result.append({"check": f"plan, {form}, {name}", "ok": same})
        direct = Plan.of(expert.to(device), E, limit)
        same = all(
            torch.equal(getattr(direct, f), getattr(there.padded(limit), f)) for f in ("token", "slot", "counts")
        )
        result.append({"check": f"plan, made padded, {name}", "ok": same})
    return result


def router(device: torch.device, T: int, E: int, k: int) -> list[Row]:
    """Compare the router's experts and weights on the device with the CPU in float64."""
    result = []
    for order in ("softmax_first", "choose_first"):
        gate = TopKGate(32, E, k, order=order)
        here, there = gate.double(), TopKGate(32, E, k, order=order).to(device)
        there.load_state_dict(gate.state_dict())
        x = drawn(T, 32, seed=6).float()
        ours, expected = there(x.to(device)), here(x.double())
        result.append({"check": f"experts, {order}", "ok": torch.equal(ours.expert.cpu(), expected.expert)})
        result.append(row(f"weight, {order}", ours.weight, expected.weight, 1e-5))
        grads = [torch.autograd.grad((r.weight**2).sum(), g.weight)[0] for r, g in ((ours, there), (expected, here))]
        result.append(row(f"router's gradient, {order}", grads[0], grads[1], 1e-4))
        for policy in ("score", "position"):
            limit = T * k // E
            kept = [drop_over_capacity(r, limit, policy) for r in (ours, expected)]
            same = torch.equal(kept[0].expert.cpu(), kept[1].expert)
            result.append({"check": f"capacity by {policy}, {order}", "ok": same})
    return result


def large(device: torch.device, T: int, D: int) -> list[Row]:
    """Check rows of more than 2^31 elements, where 32-bit offsets overflow."""
    expert = (torch.arange(T, device=device).unsqueeze(1) + torch.arange(8, device=device)) % 16
    plan = Plan.of(expert, 16)
    x = torch.randint(-8, 8, (T, D), device=device).to(torch.bfloat16)
    rows = encode(x, plan)
    same = torch.equal(rows[-1000:], x[plan.token[-1000:]])
    result: list[Row] = [{"check": f"encode, {rows.numel():.3g} elements", "ok": same}]
    y = decode(rows, plan)  # small integers: 8 x is exact
    result.append({"check": f"decode, {rows.numel():.3g} elements", "ok": torch.equal(y, x * 8)})
    return result


def reference(x: Tensor, router: Tensor, up: Tensor, gate: Tensor, down: Tensor, k: int) -> Tensor:
    """The layer in plain PyTorch: softmax over all experts, top-k, weights normalised to sum 1, SwiGLU experts."""
    weight, expert = (x @ router.T).softmax(-1).topk(k)
    weight = weight / weight.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for e in range(len(up)):
        token, place = (expert == e).nonzero(as_tuple=True)
        hidden = F.silu(x[token] @ gate[e]) * (x[token] @ up[e])
        y = y.index_add(0, token, weight[token, place].unsqueeze(1) * (hidden @ down[e]))
    return y


def build(
    device: torch.device, dtype: torch.dtype, kernel: str | None, D: int, H: int, E: int, k: int, **options
) -> MoE:
    made = MoE(D, H, E, k, seed=0, balance=0, **options)
    with torch.no_grad():
        made.gate.weight.copy_(drawn(E, D, seed=7))  # scores far apart, so that rounding changes no choice
    if kernel is not None:
        made.experts.kernel = kernel
    return made.to(device, dtype)


def parameters(made: MoE) -> list[Tensor]:
    return [made.gate.weight, made.experts.w_up, made.experts.w_gate, made.experts.w_down]


def step(made: MoE, call: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> list[Tensor]:
    """Forward and backward: y, and the gradients of x and of each parameter, in the order of `reference`."""
    x = x.detach().requires_grad_()
    made.zero_grad()
    y = call(x)
    y.backward(grad)
    return [y.detach(), x.grad, *(p.grad for p in parameters(made))]


NAMES = ("y", "gradient of x", "of the router", "of w_up", "of w_gate", "of w_down")


def layer(
    device: torch.device, dtype: torch.dtype, kernel: str | None, T: int, D: int, H: int, E: int, k: int
) -> list[Row]:
    """Compare the layer with float64, dropless and padded, for H below and above D.

    The weight of the gate multiplies the narrower side of the experts, so both cases differ.
    """
    result = []
    for hidden, options in ((H, {}), (2 * D, {}), (H, {"capacity": Capacity(E / k, pad=True)})):
        made = build(device, dtype, kernel, D, hidden, E, k, **options)
        x, grad = drawn(T, D, seed=8).to(dtype), drawn(T, D, seed=9).to(dtype)
        ours = step(made, made, x.to(device), grad.to(device))
        inputs = [t.detach().double().cpu().requires_grad_() for t in (x, *parameters(made))]
        y = reference(*inputs, k)
        expected = [y, *torch.autograd.grad(y, inputs, grad.double())]
        more = {"dtype": str(dtype).removeprefix("torch."), "H": hidden, "pad": bool(options)}
        result += [row(name, a, b, CHAINED[dtype], **more) for name, a, b in zip(NAMES, ours, expected, strict=True)]
        swapped = [inputs[0], inputs[1].roll(1, 0), *inputs[2:]]
        seen = error(ours[0], reference(*swapped, k)) > 10 * CHAINED[dtype]
        result.append({"check": "wrong experts are seen", **more, "ok": seen})
    return result


def repeated(device: torch.device, kernel: str | None, T: int, D: int, H: int, E: int, k: int) -> list[Row]:
    result = []
    for name, options in {"ragged": {}, "padded": {"capacity": Capacity(1.25, pad=True)}}.items():
        made = build(device, torch.bfloat16, kernel, D, H, E, k, **options)
        x, grad = (drawn(T, D, seed=s).to(device, torch.bfloat16) for s in (8, 9))
        first = step(made, made, x, grad)
        same = all(all(map(torch.equal, first, step(made, made, x, grad))) for _ in range(3))
        result.append({"check": f"four runs equal to the bit, {name}", "ok": same})
    return result


@contextmanager
def sync_is_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def unsynchronised(device: torch.device, kernel: str | None, T: int, D: int, H: int, E: int, k: int) -> list[Row]:
    """Check that forward and backward never wait for the device, as far as torch can tell."""
    result = []
    for name, options in {"ragged": {}, "padded": {"capacity": Capacity(1.25, pad=True)}}.items():
        made = build(device, torch.bfloat16, kernel, D, H, E, k, **options)
        x, grad = (drawn(T, D, seed=s).to(device, torch.bfloat16) for s in (8, 9))
        step(made, made, x, grad)
        with sync_is_error():
            step(made, made, x, grad)
        result.append({"check": f"no host sync, {name}", "ok": True})  # a host sync raises an error
    return result


def captured(device: torch.device, kernel: str | None, T: int, D: int, H: int, E: int, k: int) -> list[Row]:
    """Check forward and backward of the padded layer in one CUDA graph, replayed on new tokens."""
    made = build(device, torch.bfloat16, kernel, D, H, E, k, capacity=Capacity(1.25, pad=True))
    first, second, grad = (drawn(T, D, seed=s).to(device, torch.bfloat16) for s in (8, 10, 9))
    x = first.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture needs a warm-up on another stream
        for _ in range(3):
            made.zero_grad()
            x.grad = None
            made(x).backward(grad)
    torch.cuda.current_stream().wait_stream(side)
    made.zero_grad()
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = made(x)
        y.backward(grad)
    result = []
    for tokens in (second, first):
        with torch.no_grad():
            x.copy_(tokens)
        graph.replay()
        replayed = [t.detach().clone() for t in (y, x.grad, *(p.grad for p in parameters(made)))]
        other = build(device, torch.bfloat16, kernel, D, H, E, k, capacity=Capacity(1.25, pad=True))
        eager = step(other, other, tokens, grad)
        result += [row(f"graph: {name}", a, b, 0) for name, a, b in zip(NAMES, replayed, eager, strict=True)]
    return result


def compiled(device: torch.device, T: int, D: int, H: int, E: int, k: int) -> list[Row]:
    result = []
    for name, options in {"ragged": {}, "padded": {"capacity": Capacity(1.25, pad=True)}}.items():
        torch._dynamo.reset()
        made = build(device, torch.bfloat16, None, D, H, E, k, **options)
        x, grad = (drawn(T, D, seed=s).to(device, torch.bfloat16) for s in (8, 9))
        eager = step(made, made, x, grad)
        ours = step(made, torch.compile(made, fullgraph=True), x, grad)
        tolerance = CHAINED[torch.bfloat16]
        result += [
            row(f"compiled: {what}", a, b, tolerance, plan=name) for what, a, b in zip(NAMES, ours, eager, strict=True)
        ]
    return result
