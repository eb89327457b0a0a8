"""The job's flags. A TOML file may give them as well, `--config`; those on the command line win."""

from __future__ import annotations

import argparse
import math
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from turnout.dispatch.wire import WIRES
from turnout.models import GPTConfig
from turnout.models.stages import PER_RANK

CHOICES = {
    "schedule": tuple(PER_RANK),
    "data_parallel": ("replicate", "zero1", "zero2", "fsdp"),
    "recompute": ("none", "full", "selective"),
    "wire": ("", *WIRES),
}
POSITIVE = ("steps", "batch", "micro_batches", "pp", "tp", "etp", "overlap", "log_every", "timeout")


@dataclass(frozen=True)
class Job:
    """What is trained, on what and how. On the command line `micro_batches` is --micro-batches."""

    steps: Annotated[int, "optimizer steps in all"] = 200
    out: Annotated[str, "folder of checkpoints and report.png"] = "runs/pretrain"
    data: Annotated[tuple[str, ...], "text files and folders; none: the standard library's source"] = ()
    resume: Annotated[bool, "go on from the newest checkpoint in --out, on any mesh"] = False
    seed: Annotated[int, "of the weights and the order of the data"] = 0
    # the model
    seq: Annotated[int, "bytes in a sequence"] = 128
    dim: Annotated[int, "model width"] = 128
    layers: Annotated[int, "blocks, of which every second one is a mixture of experts"] = 4
    heads: Annotated[int, "of attention"] = 4
    hidden: Annotated[int, "width of one expert"] = 256
    experts: Annotated[int, "in each mixture"] = 8
    top_k: Annotated[int, "experts a byte visits"] = 2
    gate: Annotated[str, "a name of turnout.moe.GATES"] = "topk"
    capacity_factor: Annotated[float, "0: no token is dropped"] = 0.0
    balance: Annotated[str, 'over which tokens: "sequence", "global" or "local"'] = "sequence"
    aux_weight: Annotated[float, "of the balance loss"] = 1e-2
    dense: Annotated[bool, "no experts: the dense twin of equal FLOPs"] = False
    # the ranks
    pp: Annotated[int, "stages of the pipeline"] = 1
    tp: Annotated[int, "ranks that split a layer and its sequences"] = 1
    ep: Annotated[int, "ranks that share the experts; 0: as many as divide both ranks and experts"] = 0
    etp: Annotated[int, "ranks that split each expert"] = 1
    micro_batches: Annotated[int, "in which a rank takes its part of the batch"] = 1
    schedule: Annotated[str, "of the pipeline"] = "1f1b"
    data_parallel: Annotated[str, "what data-parallel ranks split"] = "replicate"
    recompute: Annotated[str, "what the backward computes again"] = "none"
    bf16: Annotated[bool, "compute in bfloat16"] = False
    fp16: Annotated[bool, "compute in float16, the loss scaled"] = False
    overlap: Annotated[int, "chunks of a batch: the next travels while the experts compute this one"] = 1
    wire: Annotated[str, 'how rows travel; "": as they are'] = ""
    timeout: Annotated[int, "seconds that a rank waits for another before it raises"] = 45
    # the optimizer
    batch: Annotated[int, "sequences in a step, on all ranks together"] = 32
    lr: Annotated[float, "highest learning rate"] = 4e-3
    warmup: Annotated[int, "steps until it is reached"] = 20
    # what is written
    eval_every: Annotated[int, "steps"] = 50
    eval_size: Annotated[int, "held-out sequences read each time"] = 128
    save_every: Annotated[int, "steps; the last one is saved as well"] = 100
    keep: Annotated[int, "checkpoints"] = 3
    log_every: Annotated[int, "steps"] = 10
    peak_tflops: Annotated[float, "of one device; the log then has the share of it in use (MFU)"] = 0.0
    tensorboard: Annotated[bool, "scalars and histograms in --out/tensorboard"] = False

    def fit(self, ranks: int) -> Job:
        """This job on so many ranks, with `ep` filled in, or ValueError: before any rank waits for another."""
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{value!r} will not do: {flag(name)} one of {', '.join(filter(None, allowed))}")
        for name in POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be positive; got {getattr(self, name)}")
        if self.bf16 and self.fp16:
            raise ValueError("--bf16 or --fp16, not both")
        _divides("the number of ranks", ranks, "pp x tp", self.pp * self.tp)
        stage = ranks // self.pp
        _divides(f"dp x tp, the ranks of one of {self.pp} stages,", stage, "etp", self.etp)
        ep = self.ep or math.gcd(stage // self.etp, self.experts)
        _divides(f"dp x tp, the ranks of one of {self.pp} stages,", stage, "ep x etp", ep * self.etp)
        _divides("--experts", self.experts, "ep", ep)
        _divides("--batch", self.batch, "dp x micro-batches", stage // self.tp * self.micro_batches)
        _divides("--eval-size", self.eval_size, "dp", stage // self.tp)
        return replace(self, ep=ep)

    def config(self) -> GPTConfig:
        """Of the whole model."""
        moe = {
            "gate": self.gate,
            "capacity_factor": self.capacity_factor or None,
            "balance": self.balance,
            "aux_loss_weight": self.aux_weight,
        }
        return GPTConfig(
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            hidden=self.hidden,
            seq_len=self.seq,
            moe_every=0 if self.dense else 2,
            num_experts=self.experts,
            top_k=self.top_k,
            moe=moe,
        )

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(argv: list[str] | None = None, about: str | None = None) -> Job:
    """The job that the command line (None: this process's) and the file named there ask for."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, help="a TOML file of these flags, as in micro-batches = 8")
    kinds = get_type_hints(Job, include_extras=True)
    for f in fields(Job):
        kind, meaning = get_args(kinds[f.name])
        shown = f"{meaning}; default: {f.default}" if f.default not in ((), "", False) else meaning
        if f.name in CHOICES:
            shown = f"{shown} ({', '.join(filter(None, CHOICES[f.name]))})"
        how: dict[str, Any] = {"type": kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif kind == tuple[str, ...]:
            how = {"nargs": "+"}
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=shown, **how)
    given = vars(parser.parse_args(argv))
    file = given.pop("config")
    values = (read(file) if file else {}) | given
    return Job(**{name: tuple(value) if name == "data" else value for name, value in values.items()})


def read(file: Path) -> dict[str, Any]:
    """The flags of a TOML file, by the names of `Job`."""
    try:
        values = {name.replace("-", "_"): value for name, value in tomllib.loads(file.read_text()).items()}
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--config {file}: {error}") from None
    kinds = get_type_hints(Job)
    if unknown := sorted(values.keys() - kinds.keys()):
        raise ValueError(
            f"--config {file}: unknown {', '.join(unknown)}; the keys are the flags, {', '.join(sorted(kinds))}"
        )
    for name, value in values.items():
        kind = kinds[name]
        wanted = {float: (float, int), tuple[str, ...]: (list,)}.get(kind, (kind,))
        if type(value) not in wanted:
            raise ValueError(f"--config {file}: {name} is {getattr(kind, '__name__', kind)}; got {value!r}")
    return values


def _divides(what: str, whole: int, by: str, part: int) -> None:
    if whole % part:
        raise ValueError(f"{what} ({whole}) must be a multiple of {part} = {by}")
