"""Compare the kernels in float8 with plain PyTorch, and save casts and errors.

TRITON_INTERPRET=1 python run_float8.py results.pt cpu         by Triton's interpreter
python run_float8.py results.pt cuda
"""

from __future__ import annotations

import sys

import torch
from turnout.moe.experts import first_use, float8


def casts(device: str) -> list[tuple[torch.Tensor, ...]]:
    """Values and scales by Triton's casts, then by plain PyTorch: rows, two tensors of rows, columns of matrices."""
    from turnout.cuda import scaling

    g = torch.Generator().manual_seed(1)
    x, w = torch.randn(20, 24, generator=g).to(device), torch.randn(3, 24, 40, generator=g).to(device)
    x[0], x[1], x[2], x[3, 5], x[4, 6], w[1, :, 3] = 0, x[1] * 1e-37, x[2] * 1e30, torch.nan, -torch.inf, 0
    found = [
        [*by.rows(x), *by.rows(x, 100 * x.flip(0)), by.columns(w), *by.matrix_rows(w, 3 * w)]
        for by in (scaling, float8)
    ]
    return [
        tuple(t.cpu() for c in pair for t in (c.values.view(torch.uint8), c.scale)) for pair in zip(*found, strict=True)
    ]


def errors(device: str) -> dict[str, dict[str, float]]:
    """Largest differences of a layer's output and gradients, with the same operands rounded."""
    kind = first_use.Kind(torch.device(device), torch.float32, 24, 40, "swiglu", True, False, True, "fp8")
    sorted_rows = kind._replace(gathers=False, bias=False)
    return {"gathered": first_use.differences(kind), "sorted": first_use.differences(sorted_rows)}


if __name__ == "__main__":
    file, device = sys.argv[1:]
    if device == "cpu":
        import interpreter

        interpreter.repair()
    torch.save({"casts": casts(device), "errors": errors(device)}, file)
