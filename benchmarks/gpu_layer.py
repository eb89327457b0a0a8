"""Speed of the whole SwiGLU layer, against a dense MLP of equal active FLOPs, plain PyTorch, and other libraries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_clock import Clock, Step
from gpu_peers import PEERS, installed, peer
from gpu_report import Row, failure, table
from torch import Tensor, nn
from turnout.moe import MoE, aux_loss

SHAPES = [(32768, 4096, 1536, 128, 8), (16384, 2048, 1024, 64, 8), (8192, 4096, 14336, 8, 2)]  # T, D, H, E, k
SMALL = [(48, 16, 24, 4, 2)]
DENSE_SHARE = 0.75  # target for forward + backward: this share of the dense MLP's TFLOP/s
Shape = tuple[int, int, int, int, int]
Contender = tuple[list[Tensor], Callable[[Tensor], Tensor]]  # (parameters, forward x [T, D] -> y [T, D])


class Case:
    """One shape: tokens, our layer with weights made on the device, and its alternatives."""

    def __init__(self, clock: Clock, T: int, D: int, H: int, E: int, k: int, dtype: torch.dtype = torch.bfloat16):
        self.clock, self.sizes, self.dtype = clock, (T, D, H, E, k), dtype
        torch.manual_seed(0)
        with torch.device("meta"):
            layer = MoE(D, H, E, k)
        self.layer = layer.to(dtype).to_empty(device=clock.device)
        self.x = torch.randn(T, D, device=clock.device, dtype=dtype, requires_grad=True)
        self.grad = torch.randn(T, D, device=clock.device, dtype=dtype)
        with torch.no_grad():
            for p in self.layer.parameters():
                p.normal_(std=0.02)
        self.tflop = 6 * T * k * D * H / 1e12  # of a forward, with three products; a backward has twice as many

    def ours(self, kernel: str | None = None, compiled: bool = False, precision: str | None = None) -> Contender:
        """Our layer; `kernel` computes its experts, None is the default, in the `precision` of that name."""
        self.layer.experts.precision = precision
        call: Callable[[Tensor], Tensor] = self.layer
        if compiled:
            torch._dynamo.reset()
            self.layer.balance = 0  # the step has no `aux_loss`
            call = torch.compile(self.layer, fullgraph=True)

        def forward(x: Tensor) -> Tensor:
            if kernel is not None:
                self.layer.experts.kernel = kernel
            y = call(x)
            aux_loss(self.layer, keep=False)  # the step has no backward of it
            return y

        return list(self.layer.parameters()), forward

    def dense(self) -> Contender:
        """Dense MLP of hidden width k * H: the same matrix products without routing."""
        _, D, H, _, k = self.sizes
        up, gate, down = (
            nn.Parameter(torch.randn(*shape, device=self.x.device, dtype=self.dtype) * 0.02)
            for shape in ((D, k * H), (D, k * H), (k * H, D))
        )
        return [up, gate, down], lambda x: (F.silu(x @ gate) * (x @ up)) @ down

    def indexed(self) -> Contender:
        """MoE layer in plain PyTorch: sort, index, grouped products, index_add."""
        layer, (_, _, _, E, k) = self.layer, self.sizes

        def forward(x: Tensor) -> Tensor:
            weight, expert = F.linear(x.float(), layer.gate.weight.float()).softmax(-1).topk(k)
            weight = (weight / weight.sum(-1, keepdim=True)).flatten()
            order = expert.flatten().argsort(stable=True)
            counts = torch.zeros(E, dtype=torch.int64, device=x.device)
            counts.scatter_add_(0, expert.flatten(), torch.ones_like(order))
            token = order // k
            y = self.products(x[token], counts.cumsum(0).to(torch.int32))
            return torch.zeros_like(x).index_add(0, token, (y * weight[order].unsqueeze(1)).to(x.dtype))

        return list(layer.parameters()), forward

    def products(self, rows: Tensor, ends: Tensor) -> Tensor:
        up, gate, down = (getattr(self.layer.experts, f"w_{name}") for name in ("up", "gate", "down"))
        hidden = F.silu(F.grouped_mm(rows, gate, offs=ends)) * F.grouped_mm(rows, up, offs=ends)
        return F.grouped_mm(hidden, down, offs=ends)

    def peer(self, name: str) -> Contender:
        _, _, H, _, k = self.sizes
        return peer(name, self.layer.gate.weight.detach(), H, k, self.dtype)

    def against(self, build: dict[str, Callable[[], Contender]], forward_alone: bool = True) -> list[Row]:
        """A row for each contender: times of forward, and of forward and backward, or the error. All alternate."""
        rows: dict[str, Row] = {
            name: {"T, D, H, E, k": ", ".join(map(str, self.sizes)), "what": name} for name in build
        }
        work = {"forward": self.tflop} if forward_alone else {}
        work["fwd+bwd"] = 3 * self.tflop
        steps: dict[str, dict[str, Step]] = {kind: {} for kind in work}
        for name, make in build.items():
            try:
                parameters, forward = make()
                for kind in steps:
                    steps[kind][name] = Step(forward, self.x, None if kind == "forward" else self.grad, parameters)
                steps["fwd+bwd"][name].complete()
            except Exception as error:
                rows[name]["error"] = failure(error)
                for kind in steps:
                    steps[kind].pop(name, None)
        for kind, tflop in work.items():
            times = self.clock.measure(dict(steps[kind]))
            for name, seconds in times.items():
                if isinstance(seconds, str):
                    rows[name]["error"] = seconds
                    continue
                rows[name][f"{kind} ms"], rows[name][f"{kind} TFLOP/s"] = seconds * 1e3, tflop / seconds
        for name, step in steps["fwd+bwd"].items():
            try:
                rows[name]["peak MiB"] = None if "error" in rows[name] else self.clock.peak(step)
            except Exception as error:
                rows[name]["error"] = failure(error)
        return list(rows.values())


def judged(clock: Clock, rows: list[Row]) -> list[Row]:
    """Add each layer's share of the dense MLP's speed, and whether it reaches the target."""
    dense = next((row.get("fwd+bwd TFLOP/s") for row in rows if row["what"] == "dense"), None)
    for row in rows:
        rate = row.get("fwd+bwd TFLOP/s")
        if isinstance(dense, float) and isinstance(rate, float):
            row["of dense"] = rate / dense
            if clock.cuda and str(row["what"]).startswith("layer"):
                row[f">= {DENSE_SHARE}"] = rate >= DENSE_SHARE * dense
    return rows


def ours(clock: Clock, shape: Shape) -> list[Row]:
    case = Case(clock, *shape)
    return judged(clock, case.against({"dense": case.dense, "indexed": case.indexed, "layer": case.ours}))


def variant(clock: Clock, shape: Shape, **options: Any) -> list[Row]:
    """Rows of a variant of the layer and of the dense MLP; a separate case, since its kernels may fail."""
    case = Case(clock, *shape)
    name = ", ".join(["layer", *(value if isinstance(value, str) else key for key, value in options.items())])
    build = {"dense": case.dense, name: partial(case.ours, **options)}
    return judged(clock, case.against(build, forward_alone="compiled" not in options))  # else it compiles twice


def rival(clock: Clock, shape: Shape, name: str) -> list[Row]:
    """Rows of another library and of our layer with its defaults; `ahead` says whether ours is faster."""
    if not installed(name):
        return [{"what": name, "error": "not installed"}]
    case = Case(clock, *shape)
    rows = case.against({"layer": case.ours, name: partial(case.peer, name)})
    mine, theirs = (row.get("fwd+bwd ms") for row in rows)
    if isinstance(mine, float) and isinstance(theirs, float):
        rows[0]["ahead"] = mine < theirs
    return rows


def where(clock: Clock, shape: Shape, file: Path | None, top: int = 15) -> list[Row]:
    """Kernels that a step of the layer spends most of its time in."""
    case = Case(clock, *shape)
    parameters, forward = case.ours()
    step = Step(forward, case.x, case.grad, parameters)
    taken = clock.measure({"step": step})["step"]
    kernels = clock.kernels(step, times=3)
    busy = sum(row["ms"] for row in kernels)
    rows = [{**row, "share": row["ms"] / busy} for row in kernels[:top]]
    rest = {"kernel": f"{len(kernels[top:])} others", "calls": sum(row["calls"] for row in kernels[top:])}
    rest |= {"ms": sum(row["ms"] for row in kernels[top:])}
    rows += [rest, {"kernel": "all", "ms": busy}]
    rows.append({"kernel": "the step, as timed", "ms": taken if isinstance(taken, str) else taken * 1e3})
    if file is not None:
        file.write_text(f"Forward and backward of the layer, T, D, H, E, k = {shape}\n\n{table(rows)}\n")
    for row in rows:
        row["kernel"] = str(row["kernel"])[:90]
    return rows


def kernels(device: torch.device) -> tuple[str, ...]:
    """Kernels that the experts can be computed with on a device. The first is the default."""
    return ("torch", "triton") if device.type == "cuda" else ("torch",)


def has_float8(device: torch.device) -> bool:
    """Whether experts can multiply in float8 on a device; a CPU emulates it."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)


def cases(clock: Clock, small: bool, profile: Path | None) -> dict[str, Callable[[], list[Row]]]:
    shapes = SMALL if small else SHAPES
    named = {f"layer {shape}": partial(ours, clock, shape) for shape in shapes}  # on torch's kernels, the default
    named["profile"] = partial(where, clock, shapes[0], profile)
    if "triton" in kernels(clock.device):
        named |= {f"layer {shape}, triton": partial(variant, clock, shape, kernel="triton") for shape in shapes}
    if has_float8(clock.device):
        named |= {f"layer {shape}, fp8": partial(variant, clock, shape, precision="fp8") for shape in shapes}
    named |= {f"layer {shape}, {name}": partial(rival, clock, shape, name) for name in PEERS for shape in shapes}
    if small:
        return named
    return named | {f"layer {shape}, compiled": partial(variant, clock, shape, compiled=True) for shape in shapes}
