"""The job's flags. A TOML file may give them as well, `--config`; those on the command line win."""

from __future__ import annotations

import argparse
import json
import math
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

import torch
from profiling import BEFORE
from turnout.dispatch.wire import WIRES
from turnout.models import GPT, GPTConfig
from turnout.models.pipeline.partition import PER_RANK
from turnout.moe import Balance
from turnout.moe.gates import GATES

CHOICES = {
    "gate": tuple(GATES),
    "balance": ("sequence", "global", "local"),
    "schedule": tuple(PER_RANK),
    "data_parallel": ("replicate", "zero1", "zero2", "fsdp"),
    "recompute": ("none", "full", "selective"),
    "wire": ("", *WIRES),
    "on_nonfinite": ("stop", "skip"),
}
# 0 or more; other numbers must be positive
MAY_BE_ZERO = (
    *("seed", "warmup", "capacity_factor", "aux_weight", "ep", "micro_batches", "virtual", "peak_tflops", "profile"),
    "ranks",
)
# What the model computes, and from which data: a run that goes on with other values is another run.
DEFINES_RUN = (
    *("seed", "seq", "dim", "layers", "heads", "hidden", "experts", "top_k", "gate", "capacity_factor"),
    *("balance", "aux_weight", "dense", "batch"),
)
# Where and how it is computed, and for how long.
MAY_CHANGE = (
    *("steps", "pp", "tp", "ep", "etp", "micro_batches", "schedule", "virtual", "data_parallel", "recompute", "bf16"),
    *("fp16", "overlap", "wire", "lr", "warmup", "on_nonfinite", "max_skipped", "check_every"),
)


@dataclass(frozen=True)
class Job:
    """What is trained, on what and how. On the command line `micro_batches` is --micro-batches."""

    steps: Annotated[int, "number of optimizer steps in all"] = 200
    out: Annotated[str, "folder for checkpoints, the log and the report"] = "runs/pretrain"
    data: Annotated[tuple[str, ...], "text files, and folders of them, to train on (default: Python's own source)"] = ()
    resume: Annotated[bool, "go on from the newest checkpoint in --out, on any mesh"] = False
    allow_changes: Annotated[bool, "let --resume go on where flags change the model or its data"] = False
    seed: Annotated[int, "seed of the weights and of the order of the data"] = 0
    # the model
    seq: Annotated[int, "number of bytes in a sequence"] = 128
    dim: Annotated[int, "width of the model"] = 128
    layers: Annotated[int, "number of blocks; every second one is a mixture of experts"] = 4
    heads: Annotated[int, "number of attention heads"] = 4
    hidden: Annotated[int, "width of one expert"] = 256
    experts: Annotated[int, "number of experts in each mixture"] = 8
    top_k: Annotated[int, "number of experts that process each byte"] = 2
    gate: Annotated[str, "router that chooses the experts"] = "topk"
    capacity_factor: Annotated[float, "room of an expert, as a multiple of its even share; 0 drops no token"] = 0.0
    balance: Annotated[str, "tokens over which the balance loss evens out the load"] = "sequence"
    aux_weight: Annotated[float, "weight of the balance loss"] = 1e-2
    dense: Annotated[bool, "train the dense model of equal FLOPs, without experts"] = False
    # the ranks
    pp: Annotated[int, "number of pipeline stages"] = 1
    tp: Annotated[int, "number of ranks that split each layer and its sequences"] = 1
    ep: Annotated[int, "number of ranks that share the experts; 0 takes as many as divide both ranks and experts"] = 0
    etp: Annotated[int, "number of ranks that split each expert"] = 1
    micro_batches: Annotated[
        int, "number of micro-batches that each rank cuts its part of the batch into; 0 takes one for each stage"
    ] = 0
    schedule: Annotated[str, "order in which the pipeline runs its micro-batches"] = "1f1b"
    virtual: Annotated[int, "number of pipeline stages on each rank; 0 takes as few as the schedule allows"] = 0
    data_parallel: Annotated[str, "what data-parallel ranks share out between them"] = "replicate"
    recompute: Annotated[str, "activations that the backward computes again, to save memory"] = "none"
    bf16: Annotated[bool, "compute in bfloat16"] = False
    fp16: Annotated[bool, "compute in float16 and scale the loss"] = False
    overlap: Annotated[int, "number of chunks of tokens; one travels while experts compute the one before"] = 1
    wire: Annotated[str, "format in which tokens travel between ranks; without it they travel as they are"] = ""
    timeout: Annotated[int, "seconds that a rank waits for another before it gives up"] = 45
    # the optimizer
    batch: Annotated[int, "number of sequences in a step, on all ranks together"] = 32
    lr: Annotated[float, "highest learning rate"] = 4e-3
    warmup: Annotated[int, "number of steps in which the learning rate rises to --lr"] = 20
    on_nonfinite: Annotated[str, "what to do when a loss or a gradient is NaN or infinite: end the job, or skip"] = (
        "stop"
    )
    max_skipped: Annotated[int, "number of steps skipped in a row that ends the job after all"] = 10
    check_every: Annotated[int, "steps between two comparisons of what several ranks hold alike"] = 200
    # what is written
    eval_every: Annotated[int, "steps between two evaluations"] = 50
    eval_size: Annotated[int, "number of held-out sequences in each evaluation"] = 128
    save_every: Annotated[int, "steps between two checkpoints; the last step is saved as well"] = 100
    keep: Annotated[int, "number of checkpoints to keep"] = 3
    log_every: Annotated[int, "steps between two log lines"] = 10
    peak_tflops: Annotated[float, "peak TFLOP/s of one device, for the share in use, MFU; 0 leaves it out"] = 0.0
    profile: Annotated[int, f"number of steps to trace with torch's profiler, after {BEFORE} others; 0 traces none"] = 0
    tensorboard: Annotated[bool, "write scalars and histograms to --out/tensorboard"] = False
    # what is planned
    plan: Annotated[bool, "say what the job would take on --ranks of a --cluster, and start nothing"] = False
    ranks: Annotated[int, "number of ranks to plan for; 0 takes those that are here"] = 0
    cluster: Annotated[str, "cluster to plan for: a preset of turnout.models.planner, or a TOML file"] = "laptop"
    links: Annotated[str, "links and products of that cluster as turnout.dispatch.autoselect.probe measured them"] = ""
    elastic: Annotated[
        bool, "take the layout that the planner finds for the ranks that are here, also at a restart"
    ] = False

    def fit(self, ranks: int) -> Job:
        """This job on so many ranks, with `ep` and `micro_batches` filled in.

        Raises:
            ValueError: flags that are out of range or do not go together, before any rank waits for another.
        """
        self._in_range()
        _divides("the number of ranks", ranks, "pp x tp", self.pp * self.tp)
        stage = ranks // self.pp
        _divides(f"dp x tp, the ranks of one of {self.pp} stages,", stage, "etp", self.etp)
        ep = self.ep or math.gcd(stage // self.etp, self.experts)
        micro_batches = self.micro_batches or self.pp
        _divides(f"dp x tp, the ranks of one of {self.pp} stages,", stage, "ep x etp", ep * self.etp)
        _divides("--experts", self.experts, "ep", ep)
        _divides("--hidden", self.hidden, "etp", self.etp)
        _divides("--batch", self.batch, "dp x micro-batches", stage // self.tp * micro_batches)
        _divides("--eval-size", self.eval_size, "dp", stage // self.tp)
        for what, size in {
            "--heads": self.heads,
            "--seq": self.seq,
            "--top-k x --hidden": self.top_k * self.hidden,
        }.items():
            _divides(what, size, "tp", self.tp)
        _divides("the vocabulary", self.config().vocab, "tp", self.tp)
        if self.pp > 1:
            self._fit_pipeline(micro_batches)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            GPT(replace(self.config(), layers=2))  # gates have demands of their own
        return replace(self, ep=ep, micro_batches=micro_batches)

    def _in_range(self) -> None:
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{value!r} will not do: {flag(name)} one of {', '.join(filter(None, allowed))}")
        for name, value in asdict(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                wanted = "0 or more" if name in MAY_BE_ZERO else "positive"
                if not (math.isfinite(value) and (value > 0 or (value == 0 and name in MAY_BE_ZERO))):
                    raise ValueError(f"{flag(name)} must be {wanted}; got {value}")
        if self.bf16 and self.fp16:
            raise ValueError("--bf16 or --fp16, not both")
        if self.ranks and not self.plan:
            raise ValueError(f"--ranks ({self.ranks}) is what --plan plans for; torchrun says how many ranks a job has")
        if self.profile and self.profile > self.steps - BEFORE:
            raise ValueError(
                f"--profile ({self.profile}) must be at most --steps less {BEFORE}, which come before the profile: "
                f"{self.steps - BEFORE}"
            )
        _divides("--dim", self.dim, "2 x heads", 2 * self.heads)
        if self.top_k > self.experts and not self.dense:
            raise ValueError(f"--top-k ({self.top_k}) must be at most --experts ({self.experts})")

    def _fit_pipeline(self, micro_batches: int) -> None:
        least, most = PER_RANK[self.schedule]
        virtual = self.virtual or least
        if virtual < least or virtual > (most or virtual):
            some = least if most == least else f"{least} or more"
            raise ValueError(f"--virtual ({self.virtual}): --schedule {self.schedule} runs {some} stages on each rank")
        stages = self.pp * virtual
        if self.layers < stages:
            raise ValueError(
                f"--layers ({self.layers}) must be at least {stages}: --schedule {self.schedule} cuts the model into "
                f"{stages} stages for --pp {self.pp}"
            )
        if self.schedule != "gpipe" and micro_batches < self.pp:
            raise ValueError(
                f"--micro-batches ({micro_batches}) must be at least pp ({self.pp}) with --schedule {self.schedule}; "
                "0 takes as many"
            )
        if self.schedule.startswith("interleaved"):
            rounds = micro_batches // self.pp
            _divides("--micro-batches", micro_batches, f"the {rounds} rounds of --schedule {self.schedule}", rounds)

    def changed(self, before: dict[str, Any]) -> tuple[list[str], list[str]]:
        """What differs from an earlier job's `asdict`, in words: what makes another run of it, and what may change."""
        now = asdict(self)
        differs = [name for name in now if name in before and json.dumps(before[name]) != json.dumps(now[name])]
        words = {name: f"{flag(name)} {_shown(now[name])} (was {_shown(before[name])})" for name in differs}
        return [words[n] for n in differs if n in DEFINES_RUN], [words[n] for n in differs if n in MAY_CHANGE]

    def config(self) -> GPTConfig:
        """Of the whole model."""
        moe = {
            "gate": self.gate,
            "capacity": self.capacity_factor or None,
            "balance": Balance(self.aux_weight, over=self.balance),
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


def _shown(value: Any) -> str:
    return "none" if value in ("", None) else str(value)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """Raises ValueError, where argparse would print its usage on each rank."""

    def error(self, message: str) -> NoReturn:
        """What is wrong with the command line."""
        raise ValueError(f"{message}; --help lists all flags")


def parse(argv: list[str] | None = None, about: str | None = None) -> Job:
    """The job that the command line (None: this process's) and the file named there ask for.

    Raises:
        ValueError: a flag that is unknown or of the wrong type, on the command line or in the file.
    """
    parser = Parser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="TOML file of these flags, as in micro-batches = 8 (default: none)")
    kinds = get_type_hints(Job, include_extras=True)
    for f in fields(Job):
        kind, meaning = get_args(kinds[f.name])
        shown = meaning
        if f.name in CHOICES:
            shown = f"{shown}: {', '.join(filter(None, CHOICES[f.name]))}"
        if f.name != "data":
            shown = f"{shown} (default: {'no' if kind is bool else f.default or 'none' if kind is str else f.default})"
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
