"""Is one batch of rows per expert faster than a product for each source rank? Work of one rank of W, simulated.

    OMP_NUM_THREADS=1 python benchmarks/layout.py

Tokens and experts per rank stay the same. So E grows with W, and each rank sends k * T / E rows to an expert.
`by source` keeps rows as they arrive, [W, L, C, D], with one product of C rows for each source and expert (GShard's
layout, arXiv:2006.16668). `one batch` is the layout of Turnout's dispatchers, [L, W * C, D]: one product per expert,
with as many rows at every W (Tutel's flexible all-to-all, arXiv:2206.03382). Times are of the forward of both matrices.
`carry` is the change of layout, part of a pass that dispatchers need anyway. Runs alternate; times are medians.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from layer import measure

T, D, H, L, K = 4096, 512, 1024, 2, 2


def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s); T={T} D={D} H={H} L={L} k={K}\n")
    print("| dtype | W | by source: products | ms | one batch: products | ms | carry ms | by source / one batch |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype, W in itertools.product((torch.float32, torch.bfloat16), (1, 2, 4, 8, 16, 32, 64)):
        C = K * T // (W * L)
        up, down = torch.randn(L, D, H, dtype=dtype) / D**0.5, torch.randn(L, H, D, dtype=dtype) / H**0.5
        came = torch.randn(W, L, C, D, dtype=dtype)
        batch = came.transpose(0, 1).reshape(L, W * C, D)

        def experts(blocks: torch.Tensor, up: torch.Tensor = up, down: torch.Tensor = down) -> None:
            for rows, first, second in zip(blocks, up, down, strict=True):
                F.gelu(rows @ first) @ second

        def by_source(came: torch.Tensor = came) -> None:
            for blocks in came.unbind(0):  # a broadcast product would copy the weights W times
                experts(blocks)

        def one_batch(batch: torch.Tensor = batch) -> None:
            experts(batch)

        def carry(came: torch.Tensor = came) -> None:
            came.transpose(0, 1).contiguous()

        with torch.no_grad():
            times = measure({"source": by_source, "batch": one_batch, "carry": carry}, rounds=9)
        ms = {name: f"{1e3 * seconds:.1f}" for name, seconds in times.items()}
        shapes = f"{W * L} of [{C}, {D}] | {ms['source']} | {L} of [{W * C}, {D}] | {ms['batch']} | {ms['carry']}"
        print(
            f"| {str(dtype).removeprefix('torch.')} | {W} | {shapes} | {times['source'] / times['batch']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
