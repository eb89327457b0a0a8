"""Scalars and histograms of a run, for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from log import mean
from torch import Tensor
from turnout.models import ParallelModel
from turnout.moe.experts.sharded import local
from turnout.moe.layer import moe_layers


def tensorboard(out: Path, first: int) -> Board:
    """Writer for TensorBoard. It hides events after step `first`, which an earlier job wrote and this one repeats."""
    from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

    return Board(SummaryWriter(str(out / "tensorboard"), purge_step=first + 1))


class Board:
    """Writes events of the log to TensorBoard."""

    def __init__(self, writer) -> None:
        self.writer = writer

    def step(self, event: dict[str, Any], model: ParallelModel) -> None:
        step = event["step"]
        scalars = {f"train/{key}": event[key] for key in ("loss", "lr")}
        scalars["train/gradient norm"] = event["gradient_norm"]
        scalars |= {"train/dropped": mean(event["dropped"]), "train/imbalance": max(event["imbalance"], default=1.0)}
        scalars |= {f"usage/{key}": event.get(key) for key in ("tokens_per_s", "tflops_per_s", "mfu", "memory_bytes")}
        scalars |= {f"usage/sent bytes/{key}": n for key, n in event["sent_bytes"].items()}
        for name, value in scalars.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)
        for index, counts in enumerate(event["tokens"]):  # one bucket per expert
            self.writer.add_histogram_raw(
                f"tokens per expert/MoE layer {index + 1}", min=0, max=len(counts) - 1, num=sum(counts),
                sum=sum(e * n for e, n in enumerate(counts)), sum_squares=sum(e * e * n for e, n in enumerate(counts)),
                bucket_limits=[e + 0.5 for e in range(len(counts))], bucket_counts=counts, global_step=step,
            )  # fmt: skip
        for name, weight in routers(model).items():
            self.writer.add_histogram(f"router/{name}", local(weight.detach()), step)

    def held_out(self, event: dict[str, Any]) -> None:
        for name in {"bits_per_byte", "loss", "accuracy"} & event.keys():
            self.writer.add_scalar(f"held out/{name.replace('_', ' ')}", event[name], event["step"])

    def close(self) -> None:
        self.writer.close()


def routers(model: ParallelModel) -> dict[str, Tensor]:
    """Router parameters of this rank's MoE layers, by name. (The `gate` of a dense SwiGLU block is no router.)"""
    found: dict[str, Tensor] = {}
    for part in model.parts:
        for name, layer in moe_layers(part).items():
            found |= {f"{name}.gate.{own}": p for own, p in layer.gate.named_parameters()}
    return found
