"""Makes the table of docs/records/transports.md: runs benchmarks/transports.py on emulated clusters, as root.

    python benchmarks/transports_report.py                  # half an hour; appends to runs/transports.jsonl, prints all
    python benchmarks/transports_report.py --only-print

Cases that are in the file are not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINKS = {
    "25 Mbit/s": "--rate 25mbit --delay 0.2ms",
    "100 Mbit/s": "--rate 100mbit --delay 0.2ms",
    "1 Gbit/s": "--rate 1gbit --delay 0.2ms",
    "100 Mbit/s, 1 ms a frame": "--rate 100mbit --delay 0.2ms --frame 1ms",
}
FRAMES, SMALL = "100 Mbit/s, 1 ms a frame", "--sizes 1024 16384 131072 --k 2 8 --cap 8"
RUNS = [  # number of nodes, ranks per node, link, options of benchmarks/transports.py
    (4, 2, "25 Mbit/s", "--sizes 1024 16384 131072 524288 --cap 10"),
    (4, 2, "25 Mbit/s", "--skewed --sizes 16384 131072 --k 4 8 --cap 8"),
    (4, 2, FRAMES, SMALL),
    (8, 2, FRAMES, SMALL),
    (4, 4, FRAMES, SMALL),
    (8, 2, "25 Mbit/s", "--sizes 1024 16384 131072 --k 4 8 --cap 8"),
    (4, 4, "25 Mbit/s", "--sizes 1024 16384 131072 --k 4 8 --cap 8"),
    (4, 2, "1 Gbit/s", "--sizes 1024 131072 1048576 4194304 16777216 --cap 8"),
    (4, 2, "100 Mbit/s", ""),
]
COLORS = {"flat": "tab:gray", "2dh": "tab:orange", "node": "tab:blue"}


def measure(file: Path, rounds: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {(r["shape"], r["link"], r["skewed"]) for r in read(file)}
    for nodes, ranks, link, options in RUNS:
        if (f"{nodes}x{ranks}", link, "--skewed" in options) in done:
            continue
        cluster = f"{ROOT}/benchmarks/cluster/emulate.py --nodes {nodes} --ranks {ranks} {LINKS[link]}"
        script = f"-- {ROOT}/benchmarks/transports.py {options} --rounds {rounds}"
        command = [sys.executable, *cluster.split(), *script.split(), "--link", link, "--out", str(file)]
        subprocess.run(command, check=True)


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def named(size: int) -> str:
    return f"{size // 2**20} MB" if size >= 2**20 else f"{size // 2**10} KB"


def print_table(records: list[dict]) -> None:
    columns = ["nodes x ranks, link", "k", "tokens of a rank", "flat ms", "2dh", "node", "auto takes"]
    columns += ["messages: flat, 2dh, node", "MB sent: flat, 2dh, node", "node / flat", "node / needed"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for r in records:
        flat, hierarchical, node = cases = [r["found"][name] for name in COLORS]
        cells = [
            f"{r['shape']}, {r['link']}{', skewed' if r['skewed'] else ''}",
            r["k"],
            named(r["size"]),
            f"{flat['seconds'] * 1e3:.0f}",
            *(f"{flat['seconds'] / other['seconds']:.2f}x" for other in (hierarchical, node)),
            r["chosen"],
            ", ".join(str(case["messages"]) for case in cases),
            ", ".join(f"{case['sent'] / 1e6:.1f}" for case in cases),
            f"{node['sent'] / flat['sent']:.2f}",
            f"{node['sent'] / node['needs']:.3f}" if r["size"] >= 2**17 else "",  # below, headers count
        ]
        print("| " + " | ".join(map(str, cells)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=ROOT / "runs" / "transports.jsonl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only-print", action="store_true", help="print the results in the file, and measure nothing")
    args = parser.parse_args()
    if not args.only_print:
        measure(args.file, args.rounds)
    print_table(read(args.file))


if __name__ == "__main__":
    main()
