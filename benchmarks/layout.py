"""Do the experts' matrix products shrink when ranks are added? One rank of W, simulated: the work that reaches it.

    OMP_NUM_THREADS=1 python benchmarks/layout.py

Tokens and experts of a rank stay the same, so E grows with W and each rank sends an expert k * T / E rows. `by source`
leaves them as they come, [W, L, C, D]: one product for each source and expert, of C rows (GShard's layout,
arXiv:2006.16668). `one batch` is what Turnout's dispatchers hand out, [L, W * C, D]: one product an expert, of as many
rows at every W (Tutel calls it flexible all-to-all, arXiv:2206.03382). Forward of both layers; `carry` is the change of
layout, which dispatchers fold into the pass they make anyway. Medians, interleaved.
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
