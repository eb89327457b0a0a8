"""The curves of a run, and the picture made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meter import told
from torch.distributed.tensor import DTensor
from turnout.models import ParallelModel


@dataclass
class Log:
    """What a run has shown so far: one entry for every few steps."""

    step: list[int] = field(default_factory=list)
    loss: list[float | None] = field(
        default_factory=list
    )  # nats per byte, mean since the last entry; None: all left out
    dropped: list[float] = field(default_factory=list)  # share of assignments
    imbalance: list[float] = field(default_factory=list)  # largest load over the mean, the worst layer's
    tokens: list[list[list[int]]] = field(default_factory=list)  # [entry][MoE layer][expert]
    usage: list[dict[str, Any]] = field(default_factory=list)  # `Meter.read`
    skipped: list[int] = field(default_factory=list)  # steps left out so far
    val_step: list[int] = field(default_factory=list)
    val_bpb: list[float] = field(default_factory=list)  # bits per held-out byte
    losses: list[float] = field(default_factory=list)  # of the steps since the last entry, those left out excepted
    skips: int = 0  # steps left out so far

    def take(self, loss: float, skips: int) -> None:
        """Note the loss of a step; and how many steps were left out so far: this one, if there are more than before."""
        if skips == self.skips:
            self.losses.append(loss)
        self.skips = skips

    def add(self, step: int, usage: dict[str, Any], tokens: list[list[int]], dropped: float) -> None:
        """An entry for the steps since the one before."""
        self.step.append(step)
        self.usage.append(usage)
        self.loss.append(sum(self.losses) / len(self.losses) if self.losses else None)
        self.losses = []
        self.skipped.append(self.skips)
        self.tokens.append(tokens)
        self.dropped.append(dropped)
        self.imbalance.append(max(imbalances(tokens), default=1.0))

    def add_held_out(self, step: int, bpb: float) -> None:
        self.val_step.append(step)
        self.val_bpb.append(bpb)

    def entry(self, **further: float) -> dict[str, Any]:
        """The last entry in JSON's types, for log.jsonl; `imbalance` of each MoE layer."""
        usage = self.usage[-1]
        return {
            "step": self.step[-1],
            "loss": self.loss[-1],
            **further,
            "tokens_per_s": usage["tokens_per_s"],
            "memory_bytes": usage["memory_bytes"],
            "dropped": self.dropped[-1],
            "imbalance": imbalances(self.tokens[-1]),
            "skipped": self.skipped[-1],
        }

    def summary(self) -> str:
        """The last entry in words."""
        loss = "no loss" if self.loss[-1] is None else f"loss {self.loss[-1]:.3f}"
        words = [loss, told(self.usage[-1])]
        if self.tokens[-1]:
            words.append(f"dropped {self.dropped[-1]:.1%}, imbalance {self.imbalance[-1]:.2f}")
        return ", ".join([*words, *([f"skipped {self.skips}"] if self.skips else [])])


def imbalances(tokens: list[list[int]]) -> list[float]:
    """The largest load of an expert over the mean, of each layer."""
    return [max(layer) * len(layer) / max(1, sum(layer)) for layer in tokens]


def draw(log: Log, path: Path) -> None:
    """Losses over steps and, for each MoE layer, a heat map of the share of tokens each expert got."""
    import math

    import matplotlib as mpl

    mpl.use("Agg")  # no display needed
    import matplotlib.pyplot as plt
    import numpy as np

    layers = len(log.tokens[-1])
    figure, axes = plt.subplots(
        1 + layers, 1, figsize=(9, 3.4 + 2.0 * layers), height_ratios=[1.7] + [1] * layers, layout="constrained"
    )
    curves, *maps = np.atleast_1d(axes)
    curves.plot(
        log.step,
        [math.nan if nats is None else nats / math.log(2) for nats in log.loss],
        color="tab:blue",
        lw=1.2,
        label="train",
    )
    curves.plot(log.val_step, log.val_bpb, "o-", color="tab:orange", lw=1.5, ms=4, label="held out")
    curves.set(xlabel="step", ylabel="bits per byte", title=f"held out: {log.val_bpb[-1]:.3f} bits per byte")
    curves.grid(alpha=0.3)
    curves.legend(frameon=False)
    for index, axis in enumerate(maps):
        counts = np.array([entry[index] for entry in log.tokens], dtype=float).T  # [expert, entry]
        share = counts / counts.sum(0) * len(counts)
        picture = axis.imshow(
            share, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, origin="lower", interpolation="nearest",
            extent=(0, log.step[-1], -0.5, len(counts) - 0.5),
        )  # fmt: skip
        axis.set(ylabel="expert", title=f"load of the experts, MoE layer {index + 1}")
        axis.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(picture, ax=axis, label="share / even share")
    if maps:
        maps[-1].set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def tensorboard(out: Path, first: int) -> Board:
    """A writer for TensorBoard; what an earlier run wrote after step `first` is hidden."""
    from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

    return Board(SummaryWriter(str(out / "tensorboard"), purge_step=first + 1))


class Board:
    """Writes what a `Log` was last given."""

    def __init__(self, writer) -> None:
        self.writer = writer

    def step(self, log: Log, model: ParallelModel, further: dict[str, float]) -> None:
        step = log.step[-1]
        scalars = {"loss": log.loss[-1], "dropped": log.dropped[-1], "imbalance": log.imbalance[-1], **further}
        for name, value in scalars.items():
            if value is None:
                continue  # all steps were left out
            self.writer.add_scalar(f"train/{name}", value, step)
        usage = log.usage[-1] | {f"sent bytes/{key}": n for key, n in log.usage[-1]["sent_bytes"].items()}
        for name, value in usage.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(f"usage/{name}", value, step)
        for index, counts in enumerate(log.tokens[-1]):  # one bucket an expert
            self.writer.add_histogram_raw(
                f"tokens per expert/MoE layer {index + 1}", min=0, max=len(counts) - 1, num=sum(counts),
                sum=sum(e * n for e, n in enumerate(counts)), sum_squares=sum(e * e * n for e, n in enumerate(counts)),
                bucket_limits=[e + 0.5 for e in range(len(counts))], bucket_counts=counts, global_step=step,
            )  # fmt: skip
        for part in model.parts:  # what this rank has of them
            for name, weight in part.named_parameters():
                if ".gate." in name:
                    held = weight.to_local() if isinstance(weight, DTensor) else weight
                    self.writer.add_histogram(f"router/{name}", held.detach(), step)

    def held_out(self, log: Log) -> None:
        self.writer.add_scalar("held out/bits per byte", log.val_bpb[-1], log.val_step[-1])

    def close(self) -> None:
        self.writer.close()
