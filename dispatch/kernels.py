"""The CUDA kernels of dispatch: encode, decode and the plan, each with a check whether it supports its input."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cuda.launch import available, launch

THREADS = 256  # threads of a block
UNROLLED = (1, 2, 4, 8)  # values of k that kernels are compiled for; other values run a loop
ELEMENT = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
BINS = 24000  # ints in shared memory that sort a plan: 96 KiB, which every GPU since sm_80 grants on request
SCALAR = {1: "unsigned char", 2: "unsigned short", 4: "unsigned", 8: "unsigned long long"}  # bytes -> type


def can_encode(x: Tensor) -> bool:
    """Whether the kernel can encode x: any dtype of up to 8 bytes."""
    return x.element_size() in SCALAR and available(x.device)


def can_decode(rows: Tensor) -> bool:
    """Whether the kernels can decode rows: float32, bfloat16 or float16."""
    return rows.dtype in ELEMENT and available(rows.device)


def encode(x: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    """x [T, D] -> rows [R, D]. `token` int64 [R] and `slot` int64 [T, k] are each other's inverse, as in a `Plan`."""
    x, token, slot = x.contiguous(), token.contiguous(), slot.contiguous()
    (tokens, k), rows = slot.shape, x.new_empty(len(token), x.shape[1])
    chunk, chunks = _chunks(x, rows)
    grid, block = _grid(tokens, chunks, THREADS, len(token))
    args = [x, token, slot, rows, tokens, len(token), chunks, k]
    launch(f"encode<{chunk}, {_unrolled(k)}>", grid, block, args)
    return rows


def decode(rows: Tensor, slot: Tensor, weight: Tensor | None = None) -> Tensor:
    """rows [R, D] -> y [T, D], the sum of each token's rows, multiplied by `weight` [T, k] if given."""
    rows, slot = rows.contiguous(), slot.contiguous()
    weight = None if weight is None else weight.float().contiguous()
    (tokens, k), y = slot.shape, rows.new_empty(len(slot), rows.shape[1])
    chunk, chunks = _chunks(rows, y)
    grid, block = _grid(tokens, chunks, THREADS)
    args = [rows, weight, slot, y, tokens, chunks, k]
    launch(f"decode<{ELEMENT[rows.dtype]}, {chunk}, {_unrolled(k)}>", grid, block, args)
    return y


def decode_backward(grad: Tensor, rows: Tensor, weight: Tensor, token: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows [R, D] and weight [T, k] of `decode`, from the gradient of its result [T, D]."""
    grad, rows, token, slot = grad.contiguous(), rows.contiguous(), token.contiguous(), slot.contiguous()
    (tokens, k), wide = slot.shape, weight.float().contiguous()
    grad_rows, grad_weight = torch.empty_like(rows), torch.empty_like(wide)
    chunk, chunks = _chunks(grad, rows, grad_rows)
    grid, block = _grid(tokens, chunks, 32, len(token))  # one warp for each token, because it sums over the row
    args = [grad, rows, wide, token, slot, grad_rows, grad_weight, tokens, len(token), chunks, k]
    launch(f"decode_backward<{ELEMENT[rows.dtype]}, {chunk}, {_unrolled(k)}>", grid, block, args)
    return grad_rows, grad_weight.to(weight.dtype)


def can_plan(expert: Tensor, num_experts: int) -> bool:
    """Whether the kernels can make a plan: below 2^31 assignments, and two sets of bins fit into shared memory."""
    return 2 * num_experts <= BINS and expert.numel() < 2**31 and available(expert.device)


def plan(expert: Tensor, num_experts: int, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """token, slot and counts of `Plan.of`, in two launches and without a host sync."""
    expert, (tokens, k), E = expert.contiguous(), expert.shape, num_experts
    n = tokens * k
    counters = min(THREADS // 32, BINS // E - 1)  # counting warps of a block, with E bins each; E more for totals
    # 2048 assignments per block, but at most 1 MiB of histogram, because every block reads all of it (from L2).
    blocks = max(1, min(_ceil(n, 2048), 2**18 // E, 1024))
    histogram = expert.new_empty(blocks, E, dtype=torch.int32)
    token = expert.new_empty(n if capacity is None else E * capacity)
    slot, counts = expert.new_empty(tokens, k), expert.new_empty(E)
    launch("plan_count", (blocks,), (THREADS,), [expert, histogram, n, E, counters], 4 * counters * E)
    args = [expert, histogram, token, slot, counts, n, k, E, counters, -1 if capacity is None else capacity]
    launch("plan_place", (blocks,), (THREADS,), args, 4 * (counters + 1) * E)
    return token, slot, counts


def _chunks(*matrices: Tensor) -> tuple[str, int]:
    """Type that a thread moves at a time (16 bytes if rows are aligned, else one element), and its number in a row."""
    size, width = matrices[0].element_size(), matrices[0].shape[1]
    if width * size % 16 == 0 and all(m.data_ptr() % 16 == 0 for m in matrices):
        return "uint4", width * size // 16
    return SCALAR[size], width


def _grid(tokens: int, chunks: int, most: int, rows: int = 0) -> tuple[tuple[int], tuple[int, int]]:
    """Blocks, and (threads of a group, groups of a block). Each token has a group of as many warps as its row can use.

    More groups follow that zero the empty rows among `rows` rows, with one thread for each row.
    """
    threads = min(_ceil(max(chunks, 1), 32) * 32, most)
    block = threads, THREADS // threads
    return (_ceil(tokens + _ceil(rows, threads), block[1]),), block


def _unrolled(k: int) -> int:
    return k if k in UNROLLED else 0


def _ceil(n: int, d: int) -> int:
    return -(-n // d)
