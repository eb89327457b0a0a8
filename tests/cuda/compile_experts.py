"""Compile the experts' Triton kernels for GPUs that are not here; print the resources of each as a line of JSON.

python compile_experts.py 80 90 100
python compile_experts.py 90 --all               in every size and dtype
python compile_experts.py 90 80 --candidates     in every size that `turnout.moe.autotune` tries: minutes
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from turnout.cuda import grouped_kernels as kernels
from turnout.cuda.tiles import Blocks, Product, sizes
from turnout.cuda.tune import candidates

D, H = 2048, 1024
TYPES = {"num_m": "i32", "rows": "i32", "weight": "*fp32", "to_weight": "*fp32"}
TYPES |= dict.fromkeys(("token", "a_token", "b_token"), "*i64")
TYPES |= dict.fromkeys(("tile_expert", "tile_start", "ends"), "*i32")


def variants() -> Iterator[tuple[str, str, dict]]:
    """A name, the key of its blocks, the kernel's constants: those of SwiGLU, which want the most."""
    shape = {"D": D, "H": H, "ACTIVATION": "swiglu", "GATHER": True}
    yield "up", "up", {**shape, "SAVE": True}
    yield "down", "down", {"K": H, "N": D, "TRANSPOSED": False, "PAIR": False}
    yield "down, backward", "down", {"K": H, "N": D, "TRANSPOSED": True, "PAIR": True}
    yield "hidden", "hidden", shape
    yield "weight", "weight", {"K": D, "N": H, "GATHER_A": True, "GATHER_B": False, "BOTH": True}


def resources(key: str, constants: dict, blocks: Blocks, arch: int, dtype: str) -> dict:
    kernel = getattr(kernels, f"{key}_kernel")
    constants = constants | {"PRECISION": "ieee", "BM": blocks.rows, "BN": blocks.columns, "BK": blocks.depth}
    signature = {n: "constexpr" if n in constants else TYPES.get(n, f"*{dtype}") for n in kernel.arg_names}
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    aligned = {places[n]: [["tt.divisibility", 16]] for n, kind in signature.items() if kind.startswith("*")}
    source = ASTSource(kernel, signature, {places[n]: value for n, value in constants.items()}, aligned)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        listed = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", listed)[1]) for word in ("REG", "STACK"))
    ptx = compiled.asm["ptx"]
    return {
        "registers": registers,
        "spilled": stack,
        "shared": compiled.metadata.shared,
        "asynchronous": ptx.count("cp.async.cg"),
        "product": next(name for name in ("tcgen05.mma", "wgmma.mma", "mma.sync", "fma.rn") if name in ptx),
    }


def tried(key: str, dtype: str, major: int, many: bool, every_candidate: bool) -> list[Blocks]:
    if not every_candidate:
        return [sizes(key, 4 if dtype == "fp32" else 2, major, many)]
    full = "torch.float32" if dtype == "fp32" else "torch.bfloat16"
    return candidates(Product(key, "", full, (0, 0), many), major)


def compile_all(archs: list[int], everything: bool, every_candidate: bool) -> Iterator[dict]:
    """What each kernel takes, in bfloat16 for many rows an expert; for few and in float32 as well if `everything`."""
    everything = everything or every_candidate
    for arch in archs:
        for dtype, many in [("bf16", True)] + ([("bf16", False), ("fp32", True)] if everything else []):
            for name, key, constants in variants():
                for blocks in tried(key, dtype, arch // 10, many, every_candidate):
                    head = {"arch": arch, "dtype": dtype, "kernel": name, "blocks": list(blocks)}
                    yield head | resources(key, constants, blocks, arch, dtype)


if __name__ == "__main__":
    for found in compile_all(
        [int(a) for a in sys.argv[1:] if a.isdigit()], "--all" in sys.argv, "--candidates" in sys.argv
    ):
        print(json.dumps(found), flush=True)
