"""How far is the planner from published runs? Its tables, in markdown.

    python benchmarks/published.py

Axes, batch and ranks are those published; micro-batch, stages on a rank and what else a paper does not say are chosen
by the planner. One set of constants a cluster: `models/planner/clusters`.
"""

from __future__ import annotations

from typing import NamedTuple

from turnout.models.planner import Architecture, Cluster, Estimate, search


class Row(NamedTuple):
    """A run: sizes, axes, ranks, sequences of a step, and what was published of it."""

    layers: int
    dim: int
    heads: int
    tp: int
    pp: int
    gpus: int
    batch: int
    published: float


TABLE_1 = [  # PTD-P (arXiv:2104.04473), table 1: TFLOP/s a GPU
    Row(24, 2304, 24, 1, 1, 32, 512, 137),
    Row(30, 3072, 32, 2, 1, 64, 512, 138),
    Row(36, 4096, 32, 4, 1, 128, 512, 142),
    Row(40, 6144, 48, 8, 1, 256, 1024, 135),
    Row(48, 8192, 64, 8, 2, 512, 1536, 138),
    Row(60, 10240, 80, 8, 4, 1024, 1792, 140),
    Row(80, 12288, 96, 8, 8, 1536, 2304, 148),
    Row(96, 16384, 128, 8, 16, 1920, 2160, 155),
    Row(105, 20480, 128, 8, 35, 2520, 2520, 163),
    Row(128, 25600, 160, 8, 64, 3072, 3072, 163),
]
TABLE_2 = [  # ... table 2, its own runs: TFLOP/s a GPU
    Row(96, 12288, 96, 8, 12, 384, 1536, 153),
    Row(96, 12288, 96, 8, 12, 768, 1536, 149),
    Row(96, 12288, 96, 8, 12, 1536, 1536, 141),
    Row(105, 20480, 128, 8, 35, 560, 2240, 171),
    Row(105, 20480, 128, 8, 35, 1120, 2240, 167),
    Row(105, 20480, 128, 8, 35, 2240, 2240, 159),
]
GPT3 = Row(96, 12288, 96, 8, 8, 1024, 1536, 140)  # ... section 5.1, the run that takes 34 days
LATER = [  # arXiv:2205.05198, table 5: seconds with full and with selective recomputation, stages on a rank
    (Row(48, 6144, 64, 8, 1, 8, 4, 1.42), 1.10, 1),
    (Row(96, 12288, 96, 8, 8, 64, 64, 18.13), 13.75, 3),
    (Row(105, 20480, 128, 8, 35, 280, 280, 49.05), 37.83, 3),
    (Row(128, 25600, 160, 8, 64, 512, 512, 94.42), 71.49, 1),
]

# Megatron-LM's README of 2024: GPT-3 with a vocabulary of 131,072 on H100, 1,152 sequences of 4,096 tokens: GPUs, MFU
STRONG_SCALING = [(96, 0.47), (4608, 0.42)]
GPT3_LONG = Architecture.dense(layers=96, dim=12288, heads=96, vocab=131072, seq=4096)

# Megatron-MoE-ModelZoo (github.com/yanring), best_practice/Qwen3: Qwen3-235B-A22B on 256 H100, 2,048 sequences: axes,
# seconds. Its queries are twice as wide as its model, which `Architecture` does not have.
QWEN3 = Architecture(
    layers=94,
    dim=4096,
    heads=64,
    kv_heads=4,
    vocab=151936,
    seq=4096,
    ffn=12288,
    experts=128,
    top_k=8,
    hidden=1536,
    moe_every=1,
)
MIXTURES = [
    ({"tp": 2, "ep": 32, "pp": 8, "virtual": 4, "micro_batch": 1}, 19.7),
    ({"tp": 2, "ep": 8, "pp": 1, "zero": 3, "micro_batch": 4, "recompute": "full"}, 17.6),
    ({"tp": 2, "ep": 8, "pp": 32, "micro_batch": 1}, 24.2),
    ({"tp": 4, "ep": 8, "pp": 8, "micro_batch": 1}, 29.0),
]


def model(row: Row) -> Architecture:
    return Architecture.dense(layers=row.layers, dim=row.dim, heads=row.heads, vocab=51200, seq=2048)


def best(row: Row, cluster: Cluster, **fixed) -> Estimate:
    """The fastest of the layouts that a row leaves open."""
    given = {"pp": row.pp, "tp": row.tp, **fixed}
    return search(model(row), cluster, row.gpus, row.batch, given, "fp16").plans[0]


def tflops(plan: Estimate) -> float:
    return plan.to_json()["tflops_per_gpu"]


def rates(rows: list[Row], cluster: Cluster) -> str:
    lines = [
        "| parameters | t | p | GPUs | batch | published TFLOP/s | planned | | micro-batch | v | bubble | GB a rank |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plan = best(row, cluster)
        shown, rate = plan.to_json(), tflops(plan)
        lines.append(
            f"| {model(row).parameters / 1e9:.1f} B | {row.tp} | {row.pp} | {row.gpus} | {row.batch} "
            f"| {row.published:g} | {rate:.1f} | {rate / row.published - 1:+.1%} | {shown['micro_batch']} "
            f"| {shown['virtual']} | {shown['bubble']:.3f} | {plan.memory.total / 1e9:.0f} |"
        )
    return "\n".join(lines)


def later(cluster: Cluster) -> str:
    lines = [
        "| parameters | GPUs | full: published s | planned | | selective: published s | planned | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, selective, virtual in LATER:
        found = [best(row, cluster, virtual=virtual, recompute=mode).seconds for mode in ("full", "selective")]
        cells = " | ".join(
            f"{seen} | {planned:.2f} | {planned / seen - 1:+.1%}"
            for seen, planned in zip((row.published, selective), found, strict=True)
        )
        lines.append(f"| {model(row).parameters / 1e9:.1f} B | {row.gpus} | {cells} |")
    return "\n".join(lines)


def strong_scaling() -> str:
    lines = ["| GPUs | published MFU | planned | | layout |", "|---|---|---|---|---|"]
    for gpus, published in STRONG_SCALING:
        plan = search(GPT3_LONG, Cluster.load("h100"), gpus, 1152, {"tp": 8}).plans[0]
        at = plan.layout
        lines.append(
            f"| {gpus} | {published:.0%} | {plan.mfu:.1%} | {plan.mfu / published - 1:+.1%} "
            f"| p {at.pp}, d {at.dp}, v {at.virtual}, micro-batch {at.micro_batch}, {at.data} |"
        )
    return "\n".join(lines)


def mixtures() -> str:
    lines = ["| layout | published s | planned | | computing | all-to-all |", "|---|---|---|---|---|---|"]
    for axes, published in MIXTURES:
        plan = search(QWEN3, Cluster.load("h100"), 256, 2048, {"etp": 1, **axes}).plans[0]
        given = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in axes.items())
        lines.append(
            f"| {given} | {published} | {plan.seconds:.1f} | {plan.seconds / published - 1:+.0%} "
            f"| {plan.breakdown.compute:.1f} | {plan.breakdown.ep:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    selene = Cluster.load("selene")
    print(f"PTD-P, table 1\n\n{rates(TABLE_1, selene)}\n")
    print(f"PTD-P, table 2 and GPT-3\n\n{rates([*TABLE_2, GPT3], selene)}\n")
    print(f"Megatron-LM a year later\n\n{later(selene)}\n")
    print(f"Megatron-Core on H100\n\n{strong_scaling()}\n")
    print(f"Qwen3-235B-A22B on H100\n\n{mixtures()}")


if __name__ == "__main__":
    main()
