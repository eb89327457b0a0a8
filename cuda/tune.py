"""What autotuning measures: the grouped GEMMs of the experts at given sizes, and the tile sizes to try for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import product as pairs
from typing import NamedTuple

import torch
from torch import Tensor

from .scaled import parts
from .tiles import WEIGHTS, Blocks, Product, sizes

Run = Callable[[], object]


class Shape(NamedTuple):
    """Sizes of the experts as one rank computes them.

    Attributes:
        tokens: T. Each token goes to `top_k` experts, which gives T * k rows.
        dim: D, width of the model.
        hidden: H, hidden width of an expert.
        experts: L, experts on this rank.
        top_k: k, experts of each token.
        activation: name of the activation.
        bias: whether experts have biases.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        gathers: whether kernels gather rows from tokens, or rows are sorted already.
        gated: whether there is a gate projection beside the up projection.
        precision: ``"fp8"``, or ``""`` for products in `dtype`.
    """

    tokens: int
    dim: int
    hidden: int
    experts: int
    top_k: int
    activation: str
    bias: bool
    dtype: str
    gathers: bool
    gated: bool
    precision: str = ""


def drawn(shape: Shape, device: torch.device) -> Tensor:
    """Experts of each token, int64 [T, k]: k different ones, all equally likely. Every call returns the same."""
    T, L, k = shape.tokens, shape.experts, shape.top_k
    first = torch.randint(L, (T, 1), generator=torch.Generator(device).manual_seed(0), device=device)
    return (first + torch.arange(k, device=device) * max(L // k, 1)) % L


def runs(shape: Shape, device: torch.device) -> list[tuple[Product, Callable[[Blocks | None], object]]]:
    """Every grouped GEMM of a step, each as a function of its tile sizes (None = the default), on random numbers.

    They are up, down, and the gradients of rows, of hidden rows, of down's matrices and of up's matrices.
    """
    from . import grouped

    _, D, H, L, k, activation, _, dtype, gathers, gated, precision = shape
    g = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device, dtype=getattr(torch, dtype))

    expert, order = drawn(shape, device).flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(L, device=device), right=True).to(torch.int32)
    R = len(order)
    groups = grouped.Groups(ends, R)
    token = order // k if gathers else None
    x, grad = (random(shape.tokens if gathers else R, D) for _ in range(2))
    weight = torch.rand(R, generator=g, device=device)
    w_up, w_down, hidden, up = random(L, D, H), random(L, H, D), random(R, H), random(R, H)
    w_gate, gate = (random(L, D, H), random(R, H)) if gated else (None, None)
    back = [(up, w_up)] if w_gate is None or gate is None else [(up, w_up), (gate, w_gate)]
    a, d, h, pairs, first, second, w_forward, w_backward = x, grad, hidden, back, w_up, w_gate, w_down, w_down
    if precision == "fp8":
        from . import scaling

        (a,), (d,), (h,), (w_backward,) = (*map(scaling.rows, (x, grad, hidden)), scaling.matrix_rows(w_down))
        first, w_forward = scaling.columns(w_up), scaling.columns(w_down)
        second = None if w_gate is None else scaling.columns(w_gate)
        rows, matrices = zip(*back, strict=True)
        pairs = list(zip(scaling.rows(*rows), scaling.matrix_rows(*matrices), strict=True))
    every: list[tuple[str, tuple[int, int], Callable[[Blocks | None], object]]] = [
        ("up", (D, H), lambda size: grouped.up(a, token, groups, weight, first, second, activation, True, size=size)),
        ("down", (H, D), lambda size: grouped.down([(h, w_forward)], groups, size=size)),
        ("down", (H, D), lambda size: grouped.down(pairs, groups, transposed=True, size=size)),
        (
            "hidden",
            (D, H),
            lambda size: grouped.hidden_backward(d, token, groups, weight, w_backward, up, gate, activation, size=size),
        ),
        ("weight", (H, D), lambda size: grouped.weight_backward(hidden, [grad], groups, b_token=token, size=size)),
        (
            "weight" if len(back) == 1 else "weights",
            (D, H),
            lambda size: grouped.weight_backward(x, [b for b, _ in back], groups, a_token=token, size=size),
        ),
    ]
    return [
        (Product.of(kernel, x if kernel in WEIGHTS else parts(a)[0], R // L, matrix), run)
        for kernel, matrix, run in every
    ]


def products(shape: Shape, device: torch.device) -> dict[Product, Callable[[Blocks], object]]:
    """The `runs` with the same best tile sizes together: the down projection and its backward, and more if D = H."""
    together: dict[Product, list[Callable[[Blocks | None], object]]] = {}
    for product, run in runs(shape, device):
        together.setdefault(product, []).append(run)
    return {product: partial(_each, these) for product, these in together.items()}


def _each(these: list[Callable[[Blocks | None], object]], size: Blocks) -> None:
    for run in these:
        run(size)


def attempts(shape: Shape, device: torch.device) -> dict[Product, dict[Blocks, Run]]:
    """Function that runs each grouped GEMM with each of its `candidates`. All are compiled, unless compiling fails.

    Args:
        shape: sizes of the experts.
        device: where to run. Other devices than GPUs run only what Triton's interpreter can.

    Raises:
        torch.OutOfMemoryError: about 5 L D H + T k (6 H + D) numbers do not fit into memory.
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    every = products(shape, device)
    tried = {product: candidates(product, major) for product in every}
    if device.type == "cuda":
        few = products(shape._replace(tokens=1, experts=1, top_k=1), device)  # these compile to the same code
        few = {(product.kernel, product.shape): run for product, run in few.items()}
        _compile([partial(few[p.kernel, p.shape], size) for p, found in tried.items() for size in found], device)
    return {product: {size: partial(run, size) for size in tried[product]} for product, run in every.items()}


def _compile(runs: Iterable[Run], device: torch.device) -> None:
    def attempt(run: Run) -> None:
        with torch.cuda.device(device), suppress(Exception):  # a failing one fails again when it is timed
            run()

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        list(pool.map(attempt, runs))


def candidates(product: Product, major: int) -> list[Blocks]:
    """Tile sizes to try on a GPU of compute capability `major` (0 in the interpreter), starting with the default.

    `tests/cuda/compile_experts.py --candidates` shows that none spills registers and all fit into shared memory.
    """
    if not major:
        return [Blocks(16, 16, 16, 4, 1, descriptors) for descriptors in (True, False)]
    kernel, narrow, float8 = product.kernel, product.dtype != "torch.float32", "float8" in product.dtype
    default = sizes(kernel, 1 if float8 else 2 if narrow else 4, major, product.many)
    tables = (_LARGE_FLOAT8 if float8 else _LARGE) if major in (9, 10) else (_MEDIUM_FLOAT8 if float8 else _MEDIUM)
    found = [Blocks(*size, descriptors=default.descriptors) for size in (tables[kernel] if narrow else _FLOAT32)]
    if narrow and not product.many:
        found = [size._replace(rows=rows, warps=4) for rows, size in pairs((64, 16), found[:3])]
    return list(dict.fromkeys([default, default._replace(descriptors=False), *found]))


# Rows, columns, depth, warps, stages, as in `Blocks`.
# fmt: off
_FLOAT32 = [(64, 64, 16, 8, 4), (128, 64, 16, 8, 3)]
_MEDIUM = {
    "up": [
        (128, 64, 32, 8, 3), (64, 64, 64, 4, 3), (64, 64, 32, 4, 4), (64, 128, 32, 8, 3), (128, 64, 64, 8, 2),
    ],
    "down": [
        (128, 128, 32, 8, 3), (128, 128, 32, 4, 3), (128, 128, 64, 8, 2), (128, 64, 64, 4, 3), (64, 128, 32, 4, 4),
        (64, 256, 32, 8, 3),
    ],
    "hidden": [
        (128, 64, 32, 8, 3), (64, 64, 64, 4, 3), (64, 64, 32, 4, 4), (64, 128, 32, 4, 3), (128, 64, 64, 8, 3),
    ],
    "weight": [
        (128, 64, 32, 8, 3), (64, 128, 32, 8, 3), (64, 64, 32, 4, 4), (64, 64, 64, 4, 3), (128, 64, 64, 8, 2),
    ],
    "weights": [
        (128, 64, 32, 8, 3), (64, 128, 32, 8, 3), (64, 64, 32, 4, 4), (64, 64, 64, 4, 3), (128, 64, 64, 8, 2),
    ],
}
_LARGE = {
    "up": [
        (128, 128, 64, 8, 4), (128, 128, 32, 8, 5), (128, 64, 64, 4, 3), (128, 64, 64, 8, 4), (64, 128, 64, 4, 4),
        (256, 64, 64, 8, 3), (64, 256, 64, 8, 3),
    ],
    "down": [
        (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4),
        (128, 128, 128, 8, 3), (64, 256, 64, 4, 4),
    ],
    "hidden": [
        (128, 128, 64, 8, 3), (128, 64, 64, 8, 4), (128, 64, 128, 8, 3), (64, 64, 64, 4, 4), (64, 128, 64, 4, 4),
        (256, 64, 64, 8, 3), (64, 256, 64, 8, 3),
    ],
    "weight": [
        (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4),
        (128, 128, 128, 8, 2), (64, 256, 64, 4, 4),
    ],
    "weights": [
        (128, 128, 64, 8, 4), (128, 128, 32, 8, 4), (128, 128, 128, 8, 2), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4),
        (256, 64, 64, 8, 3), (64, 256, 64, 8, 3),
    ],
}
_MEDIUM_FLOAT8 = {
    "up": [(64, 64, 64, 4, 3), (64, 64, 64, 4, 4)],
    "down": [(64, 64, 64, 4, 3), (64, 64, 64, 4, 4)],
    "hidden": [(64, 64, 64, 4, 3), (64, 64, 64, 4, 4)],
}
_LARGE_FLOAT8 = {
    "up": [(128, 64, 128, 8, 4), (128, 64, 128, 8, 3)],
    "down": [(128, 128, 128, 8, 3), (128, 64, 128, 8, 4)],
    "hidden": [(128, 128, 128, 8, 3), (128, 64, 128, 8, 4)],
}
# fmt: on
