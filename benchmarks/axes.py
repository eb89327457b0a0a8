"""Is [B, S, D] or [S, B, D] faster? A transformer block in both layouts: forward and backward in float32.

    OMP_NUM_THREADS=1 python benchmarks/axes.py

Matrix products see B * S rows in both layouts. Two things differ: the memory layout of attention's heads, and gathers
of sequence parallelism. Gathered parts of the sequence come one after the other. In [S, B, D] that is the whole
sequence, in [B, S, D] it needs one more copy. `gather` is the time of that copy for one activation. A block has four
of them in forward and backward. Both layouts alternate. Times are medians, with the fastest in brackets.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from turnout.moe.experts.shared import FeedForward

SIZES = [(8, 128, 256, 8), (32, 128, 256, 8), (4, 512, 512, 8)]  # B, S, D, heads
ORDERS = {"[B, S, D]": "b s (h d)", "[S, B, D]": "s b (h d)"}
PARTS, ROUNDS = 4, 15


class Block(nn.Module):
    """Pre-norm block with causal attention and without positions; `axes` is the layout of x, in einops' notation."""

    def __init__(self, dim: int, heads: int, axes: str) -> None:
        super().__init__()
        self.heads, self.axes = heads, axes
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.feed_forward = FeedForward(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (rearrange(f(y), f"{self.axes} -> b h s d", h=self.heads) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(rearrange(y, f"b h s d -> {self.axes}"))
        return x + self.feed_forward(self.norms[1](x))


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {ROUNDS} rounds\n")
    print("| B, S, D, heads |", " ms | ".join(ORDERS), f"ms | second / first | gather of {PARTS}, ms |")
    print("|---|---|---|---|---|")
    for batch, length, dim, heads in SIZES:
        torch.manual_seed(0)
        blocks = {name: Block(dim, heads, axes) for name, axes in ORDERS.items()}
        blocks["[S, B, D]"].load_state_dict(blocks["[B, S, D]"].state_dict())
        first = torch.randn(batch, length, dim)
        inputs = dict(zip(ORDERS, (first, first.transpose(0, 1).contiguous()), strict=True))
        parts = torch.randn(PARTS, batch, length // PARTS, dim)
        times: dict[str, list[float]] = {name: [] for name in (*ORDERS, "gather")}
        for counted in range(-2, ROUNDS):
            for name in times:
                start = time.perf_counter()
                if name == "gather":
                    rearrange(parts, "t b s d -> b (t s) d")
                else:
                    x = inputs[name].requires_grad_()
                    blocks[name](x).square().mean().backward()
                if counted >= 0:
                    times[name].append(1e3 * (time.perf_counter() - start))
        cells = [f"{statistics.median(ms):.1f} ({min(ms):.1f})" for ms in times.values()]
        ratio = statistics.median(b / a for a, b in zip(*(times[name] for name in ORDERS), strict=True))
        sizes = f"{batch}, {length}, {dim}, {heads}"
        print(f"| {sizes} | {cells[0]} | {cells[1]} | {ratio:.2f} | {cells[2]} |", flush=True)


if __name__ == "__main__":
    main()
