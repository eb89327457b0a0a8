"""Compile the experts' Triton kernels for GPUs that are not here; print the resources of each as a line of JSON.

python compile_experts.py 80 90 100
python compile_experts.py 90 --all            in every size and dtype
python compile_experts.py 90 --float8         in float8
python compile_experts.py 90 --candidates     in every size that `turnout.moe.autotune` tries: many minutes

What is compiled is what `turnout.cuda.grouped` launches, recorded as it launches it, on tensors without memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor
from turnout.cuda import grouped, grouped_kernels, scaling, scaling_kernels, tiles
from turnout.cuda.tune import candidates

T, D, H, E = 4096, 2048, 1024, 4
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
DTYPES[torch.float8_e4m3fn] = "fp8e4nv"
MOST = 10  # candidates of a kernel
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


class Launch(NamedTuple):
    """A kernel, and all that it was launched with, by name."""

    kernel: Any
    arguments: dict[str, Any]


class Recorder:
    """Stands where a kernel stood: notes its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        names = self.kernel.arg_names
        return lambda *args, **named: self.launches.append(
            Launch(self.kernel, dict(zip(names, args, strict=False)) | named)
        )


def launches(dtype: torch.dtype, gathered: bool, blocks: Callable[..., tiles.Blocks]) -> dict[str, Launch]:
    """What a step of SwiGLU, which wants the most, launches, by name; with biases where rows are not gathered.

    `blocks`: in the place of the one in `tiles`.
    """
    recorded: list[Launch] = []
    for name in ("tiles", "up", "down", "hidden", "weight", "bias"):
        setattr(grouped, f"{name}_kernel", Recorder(getattr(grouped_kernels, f"{name}_kernel"), recorded))
    grouped.blocks = blocks

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    R = 2 * T
    groups, weight = grouped.Groups(empty(E, dtype=torch.int32), R), empty(R, dtype=torch.float32)
    token = empty(R, dtype=torch.int64) if gathered else None
    x, grad = (empty(T if gathered else R, D) for _ in range(2))
    w_up, w_gate, w_down = empty(E, D, H), empty(E, D, H), empty(E, H, D)
    b_up, b_gate, b_down = (None, None, None) if gathered else (empty(E, H), empty(E, H), empty(E, D))
    hidden, *before = grouped.up(x, token, groups, weight, w_up, w_gate, "swiglu", True, b_up, b_gate)
    grouped.down([(hidden, w_down)], groups, bias=b_down, weight=weight)
    grouped.down(list(zip(before, (w_up, w_gate), strict=True)), groups, transposed=True)
    grouped.hidden_backward(grad, token, groups, weight, w_down, *before, "swiglu")
    grouped.weight_backward(hidden, [grad], groups, b_token=token)
    grouped.weight_backward(x, before, groups, a_token=token)
    names = ["up", "down", "down, backward", "hidden", "weight, one", "weight, two"]
    if not gathered:
        grouped.bias_backward(grad, groups, token, weight, b_down)
        names.append("bias")
    cut = [launch for launch in recorded if launch.kernel is grouped_kernels.tiles_kernel]
    recorded = [launch for launch in recorded if launch.kernel is not grouped_kernels.tiles_kernel]
    return dict(zip(names, recorded, strict=True)) | ({} if gathered else {"tiles": cut[0]})


def float8_launches(gathered: bool, blocks: Callable[..., tiles.Blocks]) -> dict[str, Launch]:
    """What a step of SwiGLU in float8 launches, without its gradients of weights."""
    recorded: list[Launch] = []
    for name in ("tiles", "up", "down", "hidden"):
        setattr(grouped, f"{name}_kernel", Recorder(getattr(grouped_kernels, f"{name}_kernel"), recorded))
    for name in ("rows_kernel", "columns_kernel"):
        setattr(scaling, name, Recorder(getattr(scaling_kernels, name), recorded))
    grouped.blocks = blocks

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    R = 2 * T
    ends, weight = empty(E, dtype=torch.int32), empty(R, dtype=torch.float32)
    groups, token = grouped.Groups(ends, R), empty(R, dtype=torch.int64) if gathered else None
    w_up, w_down = empty(E, D, H), empty(E, H, D)
    (x,), columns = scaling.rows(empty(T if gathered else R, D)), scaling.columns(w_up)
    hidden, *before = grouped.up(x, token, groups, weight, columns, columns, "swiglu", True)
    (hidden,) = scaling.rows(hidden, ends=ends)
    grouped.down([(hidden, scaling.columns(w_down))], groups, bias=None, weight=weight)
    grouped.hidden_backward(x, token, groups, weight, scaling.matrix_rows(w_down)[0], *before, "swiglu")
    pairs = zip(scaling.rows(*before, ends=ends), scaling.matrix_rows(w_up, w_up), strict=True)
    grouped.down(list(pairs), groups)
    names = ["rows", "columns", "up", "rows, hidden", "columns, down", "down", "matrix rows, down", "hidden"]
    names += ["rows, two", "matrix rows, two", "down, backward"]
    recorded = [launch for launch in recorded if launch.kernel is not grouped_kernels.tiles_kernel]
    return dict(zip(names, recorded, strict=True))


def chosen(arch: int, many: bool = True, pointers: bool = False) -> Callable[..., tiles.Blocks]:
    """`blocks` for that architecture; `pointers`: without descriptors, as where sizes are no multiples of 16 bytes."""

    def blocks(kernel: str, x: torch.Tensor, *_: object) -> tiles.Blocks:
        size = tiles.sizes(kernel, x.element_size(), arch // 10, many)
        return size._replace(descriptors=size.descriptors and not pointers)

    return blocks


def tried(arch: int, many: bool, place: int) -> Callable[..., tiles.Blocks]:
    """The candidate at `place` of each kernel, the last one where there are not so many."""

    def blocks(kernel: str, x: torch.Tensor, _: int, shape: tuple[int, int] | None = None) -> tiles.Blocks:
        if shape is None:  # not measured
            return tiles.sizes(kernel, x.element_size(), arch // 10, many)
        found = candidates(tiles.Product(kernel, "", str(x.dtype), shape, many or kernel == "weight"), arch // 10)
        return found[min(place, len(found) - 1)]

    return blocks


def signature(value: Any) -> str:
    """How Triton writes the type of an argument."""
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{DTYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
    if isinstance(value, torch.Tensor):
        return f"*{DTYPES[value.dtype]}"
    return "constexpr"


def compiled(launch: Launch, arch: int) -> Any:
    """The kernel, for that architecture."""
    kernel, arguments = launch
    options = {name: arguments[name] for name in OPTIONS if name in arguments}
    kinds = {name: signature(arguments[name]) for name in kernel.arg_names}
    kinds |= dict.fromkeys(set(kinds) & {"num_m", "R"}, "i32")
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    aligned = {places[n]: [["tt.divisibility", 16]] for n, kind in kinds.items() if kind.startswith("*")}
    constants = {places[n]: arguments[n] for n, kind in kinds.items() if kind == "constexpr"}
    source = ASTSource(kernel, kinds, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def tool(name: str, cubin: bytes, *options: str) -> str:
    """What one of Triton's own tools prints of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def resources(found: Any) -> dict:
    """Registers and memory; how the PTX loads and multiplies."""
    listed = tool("cuobjdump", found.asm["cubin"], "--dump-resource-usage")
    registers, stack = (int(re.search(rf"{word}:(\d+)", listed)[1]) for word in ("REG", "STACK"))
    ptx = found.asm["ptx"]
    loops = "".join(re.findall(r"scf\.for .*?scf\.yield", found.asm["ttgir"], re.DOTALL))
    return {
        "chained": chained(found.asm["ttir"]),
        "registers": registers,
        "spilled": stack,
        "shared": found.metadata.shared,
        "asynchronous": ptx.count("cp.async.cg"),
        "described": ptx.count("cp.async.bulk.tensor"),
        "waited for": len(re.findall(r"tt\.load [^\n]*tensor<\d+x\d+x!tt\.ptr", loops)),
        "float8": bool(re.search(r"mma[^\n]*(e4m3\.e4m3|f8f6f4)", ptx)),
        "product": next((name for name in ("tcgen05.mma", "wgmma.mma", "mma.sync", "fma.rn") if name in ptx), "none"),
    }


def chained(ttir: str) -> int:
    """Number of products in a loop that add to the result of another product of the same pass through the loop.

    For sm_100 and sm_103, Triton 3.6 to 3.8 compiles two such products wrong
    (https://github.com/triton-lang/triton/issues/10821): write a loop for each product, or a sum for each.
    """
    wrong = 0
    for body in re.findall(r"scf\.for (?:(?!scf\.for ).)*?scf\.yield", ttir, re.DOTALL):
        made = re.findall(r"(%[\w#]+) = tt\.dot [^\n]*?, [^\n]*?, (%[\w#]+)[ ,]", body)
        results = {result for result, _ in made}
        wrong += sum(added in results for _, added in made)
    return wrong


def compile_all(archs: list[int], everything: bool) -> Iterator[dict]:
    """What each kernel takes, in bfloat16 for many rows an expert; if `everything`, for few, by pointer, in float32."""
    for arch in archs:
        asked = [(torch.bfloat16, True, False)]
        if everything:
            asked += [(torch.bfloat16, False, False), (torch.bfloat16, True, True), (torch.float32, True, False)]
        for dtype, many, pointers in asked:
            for gathered in (True, False):
                yield from compile_these(arch, dtype, gathered, chosen(arch, many, pointers))


def compile_float8(archs: list[int]) -> Iterator[dict]:
    """What each kernel takes in float8, for many rows an expert and for few."""
    for arch in archs:
        for many, gathered in ((True, True), (True, False), (False, True)):
            for name, launch in float8_launches(gathered, chosen(arch, many)).items():
                yield described(launch, arch, name, gathered)


def compile_candidates(archs: list[int]) -> Iterator[dict]:
    """What each kernel takes in all the tiles that are tried for it, some of them twice."""
    for arch in archs:
        for dtype, many in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)):
            for place in range(MOST):
                for gathered in (True, False):
                    yield from compile_these(arch, dtype, gathered, tried(arch, many, place))


def compile_these(arch: int, dtype: torch.dtype, gathered: bool, blocks: Callable[..., tiles.Blocks]) -> Iterator[dict]:
    for name, launch in launches(dtype, gathered, blocks).items():
        yield {"dtype": DTYPES[dtype]} | described(launch, arch, name, gathered)


def described(launch: Launch, arch: int, name: str, gathered: bool) -> dict:
    size = [launch.arguments.get(n) for n in ("BM", "BN", "BK", "num_warps", "num_stages")]
    return {"arch": arch, "kernel": name, "gathered": gathered, "blocks": size} | resources(compiled(launch, arch))


if __name__ == "__main__":
    archs = [int(a) for a in sys.argv[1:] if a.isdigit()]
    found = compile_all(archs, "--all" in sys.argv)
    if "--candidates" in sys.argv:
        found = compile_candidates(archs)
    if "--float8" in sys.argv:
        found = compile_float8(archs)
    for line in found:
        print(json.dumps(line), flush=True)
