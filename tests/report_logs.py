"""Logs as the main job writes them, of runs that never were."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

NOW = time.time() - 600
HOSTILE = (
    """<script>document.title='run'</script><img src=x onerror="document.title='run'">'"&amp;</style> $x^2$ {css}"""
)


class Run:
    """Writes lines of a log; `layers` MoE layers, 0 for a dense model."""

    def __init__(self, folder: Path, layers: int = 2, experts: int = 8, steps: int = 100, every: int = 10):
        self.path, self.layers, self.experts, self.total, self.every = (
            folder / "log.jsonl",
            layers,
            experts,
            steps,
            every,
        )
        self.random, self.time, self.skipped = np.random.default_rng(0), NOW, 0
        self.lean = self.random.normal(0, 0.6, (layers, experts))  # how much better liked each expert is
        folder.mkdir(parents=True, exist_ok=True)

    def line(self, event: str, step: int, **values: Any) -> None:
        with open(self.path, "a") as file:
            print(json.dumps({"event": event, "step": step, "time": self.time, **values}), file=file)

    def start(self, step: int = 0, restart: bool = False, **changed: Any) -> None:
        self.time += 40.0 if step else 0.0
        job = {"steps": self.total, "out": "runs/x", "data": [], "lr": 4e-3, "layers": 2 * self.layers, "gate": "topk"}
        job |= {"experts": self.experts, "bf16": False, "wire": "", "aux_weight": 1e-2, "log_every": self.every}
        self.line(
            "start", step, run="5f3a9c21", restart=restart, job=job | changed, ranks=8, device="cpu",
            mesh={"pp": 2, "dp": 2, "tp": 2, "ep": 4, "etp": 1}, parameters=5_312_000, active_parameters=2_101_000,
            train_bytes=31_400_000, held_out_bytes=2_100_000,
        )  # fmt: skip

    def step(self, step: int, **values: Any) -> None:
        self.time += 7.0
        even = math.exp(-step / self.total * 4)
        weights = np.exp(self.lean * even + self.random.normal(0, 0.08, self.lean.shape))
        tokens = np.round(weights / weights.sum(1, keepdims=True) * 81920).astype(int) if self.layers else weights
        loss = (2.1 + 3.2 * math.exp(-6 * step / self.total)) * math.log(2) + self.random.normal(0, 0.02)
        standard: dict[str, Any] = {
            "loss": loss, "lr": 4e-3 * min(1, step / 20) * (0.55 + 0.45 * math.cos(math.pi * step / self.total)),
            "gradient_norm": float(np.exp(self.random.normal(0, 0.3) + even)),
            "tokens_per_s": 61_000 + 900 * self.random.normal(),
            "tflops_per_s": 0.42, "memory_bytes": 1.2e9 + 1e6 * step,
            "sent_bytes": {"dp all_reduce": 4_200_000, "ep all_to_all": 9_800_000,
                           "tp all_gather": 2_000_000, "pp send": 260_000},
            "skipped": self.skipped, "dropped": [0.01 * even * (i + 1) / self.layers for i in range(self.layers)],
            "imbalance": (tokens.max(1) / tokens.mean(1)).tolist() if self.layers else [], "tokens": tokens.tolist(),
        }  # fmt: skip
        self.line("step", step, **standard | values)

    def steps(self, first: int, last: int, **values: Any) -> None:
        """The lines of the steps after `first`, and evaluations and checkpoints in between."""
        for step in range(first + self.every, last + 1, self.every):
            self.step(step, **values)
            if step % (5 * self.every) == 0:
                self.held_out(step)
                self.line("checkpoint", step, stall_s=0.4 + 0.2 * self.random.random(), seconds=3.1)

    def held_out(self, step: int) -> None:
        taken = [
            [
                [[int(byte), int(900 * 0.7**i)] for i, byte in enumerate(self.random.choice(256, 8, replace=False))]
                for _ in range(self.experts)
            ]
            for _ in range(self.layers)
        ]
        self.line("held out", step, bits_per_byte=2.2 + 3.2 * math.exp(-6 * step / self.total), bytes=taken)

    def end(self, step: int, reason: str = "done") -> None:
        self.line("end", step, reason=reason)


def small(folder: Path, layers: int = 2, experts: int = 8) -> Run:
    """A run that is done."""
    run = Run(folder, layers, experts)
    run.start()
    run.steps(0, 100)
    run.end(100)
    return run


def large(folder: Path) -> Run:
    """32 layers of 64 experts over 100 lines, with all that can happen, and going on."""
    run = Run(folder, layers=32, experts=64, steps=1500)
    run.start()
    run.steps(0, 330)
    run.line("spike", 330, loss=3.9, median=2.1, parameter="blocks.3.moe.experts.up", rank=5)
    run.start(300, restart=True)
    run.steps(300, 620, mfu=0.31)
    run.end(620, "stopped by SIGTERM")
    run.start(620, lr=2e-3, aux_weight=3e-3)
    run.skipped = 3
    run.steps(620, 1000, mfu=0.33)
    run.line("spike", 700, loss=2.9, median=1.6, parameter="blocks.30.attention.out.weight", rank=1)
    return run
