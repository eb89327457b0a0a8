"""Draws dispatch.svg, and the other pictures from tables in docs/records: python docs/images/draw.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
RECORDS = HERE.parent / "records"
EXPERTS = [[2, 0, 3, 0], [1, 2, 0, 3]]  # of each token, on two ranks that have two experts each
COLORS = ["#4269d0", "#efb118", "#3ca951", "#ff725c"]  # of experts
STEPS = ["tokens", "permuted", "experts", "returned", "outputs"]
MOVES = ["router, permute", "all-to-all", "all-to-all", "unpermute, combine"]


def dispatch() -> str:
    """Eight tokens on two ranks on their way to four experts and back, as SVG."""
    tokens = [(rank, place, e) for rank, experts in enumerate(EXPERTS) for place, e in enumerate(experts)]
    sent = sorted(tokens, key=lambda token: (token[0], token[2], token[1]))  # each rank sorts its rows by expert
    received = sorted(sent, key=lambda token: (token[2], token[0], token[1]))  # whose owners get them in this order
    left, top, across, down, gap = 96, 56, 168, 27, 26

    def corner(column: int, token: tuple[int, int, int]) -> tuple[int, int]:
        row = (tokens, sent, received, sent, tokens)[column].index(token)
        second = (token[2] >= 2) if column == 2 else token[0]
        return left + column * across, top + row * down + second * gap

    height = top + 8 * down + gap + 14
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="860" height="{height}" rx="8" fill="#fff"/>',
    ]
    for rank in (0, 1):
        y = top + rank * (4 * down + gap) - 8
        out.append(f'<rect x="12" y="{y}" width="836" height="{4 * down + 12}" rx="6" fill="#f3f4f6"/>')
        out.append(f'<text x="24" y="{y + 64}" fill="#333">rank {rank}</text>')
    for column, move in enumerate(MOVES):
        x = left + column * across + 66 + (across - 66) / 2
        out.append(f'<text x="{x:.0f}" y="38" fill="#777" font-size="11" text-anchor="middle">{move}</text>')
        for token in tokens:
            (x1, y1), (x2, y2) = corner(column, token), corner(column + 1, token)
            path = f"M{x1 + 66} {y1 + 10} C{x1 + 110} {y1 + 10} {x2 - 44} {y2 + 10} {x2} {y2 + 10}"
            out.append(f'<path d="{path}" fill="none" stroke="{COLORS[token[2]]}" stroke-width="1.6"/>')
    for column, step in enumerate(STEPS):
        out.append(f'<text x="{left + column * across + 33}" y="20" fill="#111" text-anchor="middle">{step}</text>')
        for token in tokens:
            (x, y), (rank, place, e) = corner(column, token), token
            label = f"expert {e}" if column == 2 else f"{'xxxyy'[column]}{4 * rank + place}"
            out.append(f'<rect x="{x}" y="{y}" width="66" height="20" rx="4" fill="{COLORS[e]}"/>')
            out.append(f'<text x="{x + 33}" y="{y + 14}" fill="#111" text-anchor="middle">{label}</text>')
    return "\n".join([*out, "</svg>\n"])


def table(page: str, first: str) -> list[list[str]]:
    """Cells of the rows of a record's table, told by its first column's heading."""
    lines = (RECORDS / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def narrow(path: Path) -> None:
    """Bits per held-out byte of narrow models: over the steps, over active parameters, and over FLOPs, with fits."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    colors = {"dense": "tab:gray", "mixture": "tab:blue"}
    for name, *cells in table("quality.md", "mean of three seeds"):
        bits = [float(cell) for cell in cells if cell]
        left.plot(range(500, 500 * len(bits) + 1, 500), bits, "o-", color=colors[name.split(",")[0]], ms=4, label=name)
    left.set(xlabel="step", ylabel="bits per held-out byte, less is better", title="equal active FLOPs, three seeds")
    left.legend(frameon=False, fontsize=8)
    runs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for budget, model, _, active, _, bits in table("quality.md", "FLOPs of a run"):
        runs.setdefault((budget, model), []).append((float(active.replace(",", "")), float(bits)))
    for (budget, model), points in runs.items():
        active, bits = np.array(points).T
        over = np.geomspace(active.min(), active.max())
        middle.plot(active, bits, "o", color=colors[model], ms=4)
        middle.plot(over, np.polyval(np.polyfit(np.log(active), bits, 2), np.log(over)), color=colors[model])
        if model == "dense":
            where = {"xytext": (-5, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
            middle.annotate(f"{budget} FLOPs", (active[0], bits[0]), fontsize=7, **where)
    middle.set(xscale="log", xlim=(1.6e4, None), xlabel="active parameters", title="four budgets of FLOPs")
    middle.set_xticks([3e4, 1e5, 3e5], ["30,000", "100,000", "300,000"])
    budgets = [(float(row[0]), float(row[2]), float(row[4])) for row in table("quality.md", "best of a budget")]
    flops, *best = np.array(budgets).T
    for (model, color), bits in zip(colors.items(), best, strict=True):
        slope, at = np.polyfit(np.log(flops / 1e12), np.log(bits), 1)
        right.plot(flops, bits, "o", color=color, ms=4)
        right.plot(flops, np.exp(at + slope * np.log(flops / 1e12)), color=color, label=f"{model}: FLOPs ^ {slope:.3f}")
    right.set(xscale="log", xlabel="FLOPs of a run", title="best of each budget")
    right.set_xticks(flops, [f"{each / 1e12:g}e12" for each in flops])
    right.legend(frameon=False, fontsize=8)
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
        axis.minorticks_off()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def quality(path: Path) -> None:
    """Bits per held-out byte of the long runs, and how many fewer than the dense model's."""
    steps = range(500, 4001, 500)
    runs = {name: [float(bits) for bits in cells] for name, *cells in table("quality.md", "model, 4,000 steps")}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
    for (name, bits), color in zip(runs.items(), ("tab:gray", "tab:blue", "tab:orange"), strict=True):
        left.plot(steps, bits, "o-", color=color, ms=3, label=name)
        saved = [dense - b for dense, b in zip(runs["dense"], bits, strict=True)]
        right.plot(steps, saved, "o-", color=color, ms=3, label=name)
    left.set(xlabel="step", ylabel="bits per held-out byte, less is better", title="equal active FLOPs, one seed")
    right.set(xlabel="step", ylabel="bits per held-out byte saved", title="improvement over dense")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def transports(path: Path) -> None:
    """How many times as fast as flat the other transports are, over message sizes, for each cluster and link."""
    sizes = {"KB": 2**10, "MB": 2**20}
    panels: dict[str, list] = {}
    for where, k, size, _, hierarchical, node, *_ in table("transports.md", "nodes x ranks, link"):
        if not where.endswith("skewed"):
            number, unit = size.split()
            panels.setdefault(where, []).append((int(k), int(number) * sizes[unit], hierarchical, node))
    rows = -(-len(panels) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(12, 2.9 * rows), squeeze=False, layout="constrained")
    for axis, (where, cases) in zip(axes.flat, panels.items(), strict=False):
        axis.axhline(1, color="tab:gray", label="flat")
        for k, style in ((2, "o:"), (4, "s--"), (8, "^-")):
            for column, (name, color) in enumerate((("2dh", "tab:orange"), ("node", "tab:blue"))):
                points = [(case[1], float(case[2 + column].rstrip("x"))) for case in cases if case[0] == k]
                axis.plot(*zip(*points, strict=True), style, ms=4, color=color) if points else None
                axis.plot([], [], style, ms=4, color=color, label=f"{name}, k = {k}")
        axis.set_xscale("log", base=2)
        axis.set(xlabel="bytes of tokens on a rank", ylabel="times as fast as flat", title=where)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7)
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    (HERE / "dispatch.svg").write_text(dispatch())
    narrow(HERE / "narrow.png")
    quality(HERE / "quality.png")
    transports(HERE / "transports.png")
