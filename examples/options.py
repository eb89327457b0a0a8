"""Flags of the main job, from the command line and from a TOML file (`--config`). The command line has priority."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Annotated, Any

import launch
import objective
import torch
from command_line import divides, flag, given
from profiling import BEFORE
from schedules import SCHEDULES, factor
from turnout.dispatch.wire import WIRES
from turnout.models import BERTConfig, GPTConfig, T5Config
from turnout.models.blocks import block_numbers
from turnout.models.context_parallel import attention_of
from turnout.models.pipeline.partition import PER_RANK, model_of
from turnout.moe import Balance
from turnout.moe.gates import GATES

CHOICES = {
    "objective": tuple(objective.MODELS),
    "gate": tuple(GATES),
    "balance": ("sequence", "global", "local"),
    "schedule": tuple(PER_RANK),
    "data_parallel": ("replicate", "zero1", "zero2", "fsdp"),
    "recompute": ("none", "full", "selective", "sqrt"),
    "optimizer": ("adamw", "muon"),
    "lr_schedule": tuple(SCHEDULES),
    "wire": ("", *WIRES),
    "cp_attention": ("", "ulysses", "ring"),
    "on_nonfinite": ("stop", "skip"),
}
# these numbers may be 0, all others must be positive
MAY_BE_ZERO = (
    *("seed", "kv_heads", "warmup", "capacity_factor", "aux_weight", "ep", "micro_batches", "virtual", "peak_tflops"),
    *("profile", "ranks", "vocab", "shared", "mtp", "mtp_weight", "z_loss", "lr_end", "ema"),
)
# These define the model and its data. --resume refuses a run that was trained with other values.
DEFINES_RUN = (
    *("seed", "seq", "dim", "layers", "moe_every", "heads", "kv_heads", "qk_norm", "untied", "hidden", "experts"),
    *("top_k", "shared", "gate", "capacity_factor", "balance", "aux_weight", "dense", "batch", "vocab", "eod"),
    *("join_documents", "objective"),
    *("optimizer", "ema", "moe_layers", "windows", "attention_bias", "mtp", "mtp_weight", "z_loss", "forced_balance"),
)
# These define where and how the model is computed, and for how long. --resume accepts other values, and names them.
MAY_CHANGE = (
    *("steps", "pp", "cp", "tp", "ep", "etp", "micro_batches", "schedule", "virtual", "data_parallel", "recompute"),
    *("cp_attention", "bf16", "fp16", "fp8", "overlap", "wire", "adapt", "place", "lr", "warmup", "on_nonfinite"),
    *("max_skipped", "check_every", "accumulate", "compile", "lr_schedule", "lr_end", "lr_decay"),
)


@dataclass(frozen=True)
class Job:
    """All flags of a job, with their help texts. On the command line, `micro_batches` is --micro-batches."""

    steps: Annotated[int, "number of optimizer steps in all"] = 200
    out: Annotated[str, "folder for checkpoints, the log and the report"] = "runs/pretrain"
    data: Annotated[
        tuple[str, ...],
        "folders of turnout.models.data, each as PATH or PATH:WEIGHT; or text files, JSONL and folders of them "
        "(default: Python's own source)",
    ] = ()
    tokenizer: Annotated[str, "what makes tokens of text: bytes, bpe:SIZE or a tokenizer.json"] = "bytes"
    epochs: Annotated[int, "number of times that the steps may pass over the data"] = 4
    vocab: Annotated[int, "number of token ids of text; 0 takes those of the data"] = 0
    eod: Annotated[int, "id of the token that begins a document; -1 takes that of the data"] = -1
    join_documents: Annotated[bool, "let attention cross the boundaries of documents, as ring attention needs"] = False
    resume: Annotated[bool, "resume from the newest checkpoint in --out, on any mesh"] = False
    allow_changes: Annotated[bool, "let --resume accept flags that change the model or its data"] = False
    seed: Annotated[int, "seed of the weights and of the order of the data"] = 0
    # the model
    objective: Annotated[str, "task: next tokens (GPT), masked tokens (BERT), or removed spans (T5)"] = "clm"
    seq: Annotated[int, "number of tokens in a sequence"] = 128
    dim: Annotated[int, "width of the model"] = 128
    layers: Annotated[int, "number of blocks"] = 4
    moe_every: Annotated[int, "every n-th block has an MoE layer"] = 2
    moe_layers: Annotated[str, "blocks with an MoE layer, from 1, such as 4-61; none takes --moe-every"] = ""
    heads: Annotated[int, "number of attention heads"] = 4
    kv_heads: Annotated[int, "number of heads for keys and values; 0 takes as many as --heads"] = 0
    qk_norm: Annotated[bool, "normalise the queries and keys of each head"] = False
    attention_bias: Annotated[bool, "give queries, keys, values and the output of attention biases"] = False
    windows: Annotated[str, "bytes that attention sees in the first blocks, such as 64,0, repeated; 0 sees all"] = ""
    mtp: Annotated[int, "number of further bytes that each position learns to predict, each by a block more"] = 0
    mtp_weight: Annotated[float, "weight of the mean loss of further bytes"] = 0.3
    z_loss: Annotated[float, "weight of the z-loss of the head, which keeps logits small"] = 0.0
    untied: Annotated[bool, "give the head a matrix of its own, in place of the embedding"] = False
    hidden: Annotated[int, "hidden width of one expert"] = 256
    experts: Annotated[int, "number of experts in each MoE layer"] = 8
    top_k: Annotated[int, "number of experts that each token is routed to"] = 2
    shared: Annotated[int, "number of shared experts, which every token visits"] = 0
    gate: Annotated[str, "router that chooses the experts"] = "topk"
    capacity_factor: Annotated[float, "capacity of an expert, as a multiple of its even share; 0 drops no token"] = 0.0
    balance: Annotated[str, "tokens over which the load-balancing loss is taken"] = "sequence"
    aux_weight: Annotated[float, "weight of the load-balancing loss"] = 1e-2
    dense: Annotated[bool, "train a dense model of equal FLOPs per token, without experts"] = False
    # the ranks
    pp: Annotated[int, "number of pipeline stages"] = 1
    cp: Annotated[int, "number of ranks that split each sequence"] = 1
    cp_attention: Annotated[str, "attention over --cp ranks; none takes ulysses where heads allow it, else ring"] = ""
    tp: Annotated[int, "number of ranks that split each layer and its sequences"] = 1
    ep: Annotated[int, "number of ranks that share the experts; 0 takes as many as divide both ranks and experts"] = 0
    etp: Annotated[int, "number of ranks that split each expert"] = 1
    micro_batches: Annotated[
        int, "number of micro-batches that each rank cuts its part of the batch into; 0 takes one for each stage"
    ] = 0
    accumulate: Annotated[int, "number of parts of the batch that run one after the other, to save memory"] = 1
    schedule: Annotated[str, "order in which the pipeline runs its micro-batches"] = "1f1b"
    virtual: Annotated[int, "number of pipeline stages on each rank; 0 takes as few as the schedule allows"] = 0
    data_parallel: Annotated[str, "kind of data parallelism; all but replicate split states over ranks"] = "replicate"
    recompute: Annotated[str, "activations that the backward computes again, to save memory"] = "none"
    compile: Annotated[bool, "compile each block by torch.compile"] = False
    forced_balance: Annotated[bool, "send tokens to experts in turn: to measure speed, not to learn"] = False
    bf16: Annotated[bool, "compute in bfloat16"] = False
    fp16: Annotated[bool, "compute in float16 and scale the loss"] = False
    fp8: Annotated[bool, "multiply tokens and experts in float8, also with --bf16 or --fp16"] = False
    overlap: Annotated[int, "number of chunks of tokens; one travels while the experts compute another"] = 1
    wire: Annotated[str, "number format of tokens that travel between ranks; none keeps the model's"] = ""
    adapt: Annotated[bool, "choose between steps, by measurement, how tokens and experts come together"] = False
    place: Annotated[bool, "move experts to other ranks between steps, where that pays"] = False
    timeout: Annotated[int, "seconds that a rank waits for another before it gives up"] = 45
    # the optimizer
    batch: Annotated[int, "number of sequences in a step, on all ranks together"] = 32
    optimizer: Annotated[str, "optimizer; muon is for hidden matrices, and adamw for the rest"] = "adamw"
    lr: Annotated[float, "highest learning rate"] = 4e-3
    warmup: Annotated[int, "number of steps until the learning rate reaches --lr"] = 20
    lr_schedule: Annotated[str, "way of the learning rate from --lr down to --lr-end times --lr"] = "cosine"
    lr_end: Annotated[float, "last learning rate, as a share of --lr"] = 0.1
    lr_decay: Annotated[float, "share of the steps in which wsd lowers the learning rate"] = 0.2
    ema: Annotated[float, "decay of an average of the weights, which is evaluated and exported; 0 keeps none"] = 0.0
    on_nonfinite: Annotated[str, "what to do if a loss or a gradient is NaN or infinite: end the job, or skip"] = "stop"
    max_skipped: Annotated[int, "number of steps skipped in a row that ends the job"] = 10
    check_every: Annotated[int, "steps between two checks that replicated weights are equal on their ranks"] = 200
    # evaluation, checkpoints and logs
    eval_every: Annotated[int, "steps between two evaluations"] = 50
    eval_size: Annotated[int, "number of held-out sequences in each evaluation"] = 128
    save_every: Annotated[int, "steps between two checkpoints; the last step is saved as well"] = 100
    keep: Annotated[int, "number of checkpoints to keep"] = 3
    log_every: Annotated[int, "steps between two log lines"] = 10
    peak_tflops: Annotated[float, "peak TFLOP/s of one device, to log model FLOPs utilisation (MFU); 0 does not"] = 0.0
    profile: Annotated[int, f"number of steps to trace with torch's profiler, after {BEFORE} others; 0 traces none"] = 0
    watch: Annotated[bool, "show the load of each MoE layer live, and what its imbalance costs"] = False
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
        """Check the flags for this number of ranks, and return the job with `ep` and `micro_batches` filled in.

        Raises:
            ValueError: flags that are out of range or do not go together. No rank waits for another before.
        """
        self._in_range()
        objective.check(self)
        divides("the number of ranks", ranks, "pp x cp x tp", self.pp * self.cp * self.tp)
        stage, split = ranks // self.pp, self.cp * self.tp
        divides(f"dp x cp x tp, the ranks of one of {self.pp} stages,", stage, "etp", self.etp)
        ep = self.ep or math.gcd(stage // self.etp, self.experts)
        micro_batches = self.micro_batches or self.pp
        divides(f"dp x cp x tp, the ranks of one of {self.pp} stages,", stage, "ep x etp", ep * self.etp)
        divides("--experts", self.experts, "ep", ep)
        divides("--hidden", self.hidden, "etp", self.etp)
        parts = stage // split * micro_batches * self.accumulate
        divides("--batch", self.batch, "dp x micro-batches x accumulate", parts)
        divides("--eval-size", self.eval_size, "dp", stage // split)
        try:
            attention = attention_of(self.config(), self.cp, self.tp, self.cp_attention or None)
        except ValueError as error:
            of_documents = self.eod >= 0 and self.objective == "clm"  # other models cross the boundaries of documents
            hint = ". --join-documents leaves out documents" if of_documents else ""
            raise ValueError(f"{error}{hint}") from None
        parts = 2 * split if self.cp > 1 and attention == "ring" else split
        divides("--seq", self.seq, "2 x cp x tp" if parts > split else "cp x tp", parts)
        for what, size in {
            "--heads": self.heads,
            "--kv-heads": self.kv_heads or self.heads,
            "(top-k + shared) x hidden": self.config().ffn,
        }.items():
            divides(what, size, "tp", self.tp)
        divides("the vocabulary", self.config().vocab, "tp", self.tp)
        if self.pp > 1:
            self._fit_pipeline(micro_batches)
        config = self.config()
        if not config.moe_layers() and not self.dense:
            raise ValueError(
                f"--moe-every ({self.moe_every}) must be at most --layers ({self.layers}), or no block has experts; "
                "--dense trains without"
            )
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            one = replace(config, layers=1, moe_every=0 if self.dense else 1)
            model_of(replace(one, mtp=0) if isinstance(one, GPTConfig) else one)  # lets the gate check arguments
        return replace(self, ep=ep, micro_batches=micro_batches)

    def _in_range(self) -> None:
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{flag(name)} must be one of {', '.join(filter(None, allowed))}; got {value!r}")
        for name, value in asdict(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                wanted = "0 or more" if name in MAY_BE_ZERO else "positive"
                if name != "eod" and not (math.isfinite(value) and (value > 0 or (value == 0 and name in MAY_BE_ZERO))):
                    raise ValueError(f"{flag(name)} must be {wanted}; got {value}")
        for name in ("lr_end", "lr_decay"):
            if (value := getattr(self, name)) > 1:
                raise ValueError(f"{flag(name)} must be at most 1.0; got {value}")
        if self.ema >= 1:
            raise ValueError(f"--ema must be below 1; got {self.ema}")
        for name in ("forced_balance", "fp8"):
            if getattr(self, name) and self.dense:
                raise ValueError(f"{flag(name)} needs experts: leave out --dense")
        if self.tensorboard and find_spec("tensorboard") is None:
            raise ValueError(f"--tensorboard: {launch.needs('tensorboard', 'train')}")
        if self.bf16 and self.fp16:
            raise ValueError("--bf16 and --fp16 exclude each other; give one of them")
        if self.ranks and not self.plan:
            raise ValueError(f"--ranks ({self.ranks}) is what --plan plans for; torchrun says how many ranks a job has")
        if self.profile and self.profile > self.steps - BEFORE:
            raise ValueError(
                f"--profile ({self.profile}) must be at most {self.steps - BEFORE}: --steps less the {BEFORE} steps "
                "before the profile"
            )
        divides("--dim", self.dim, "2 x heads", 2 * self.heads)
        divides("--heads", self.heads, "kv-heads", self.kv_heads or self.heads)
        if self.top_k > self.experts and not self.dense:
            raise ValueError(f"--top-k ({self.top_k}) must be at most --experts ({self.experts})")

    def _fit_pipeline(self, micro_batches: int) -> None:
        least, most = PER_RANK[self.schedule]
        virtual = self.virtual or least
        if virtual < least or virtual > (most or virtual):
            some = least if most == least else f"{least} or more"
            raise ValueError(f"--virtual ({self.virtual}): --schedule {self.schedule} runs {some} stages on each rank")
        stages, stacks = self.pp * virtual, self.config().num_blocks // self.layers  # a T5 has two stacks of blocks
        if self.layers * stacks < stages:
            raise ValueError(
                f"--layers ({self.layers}) must be at least {-(-stages // stacks)}: --schedule {self.schedule} cuts "
                f"the model into {stages} stages for --pp {self.pp}"
            )
        if self.schedule != "gpipe" and micro_batches < self.pp:
            raise ValueError(
                f"--micro-batches ({micro_batches}) must be at least pp ({self.pp}) with --schedule {self.schedule}; "
                "0 takes as many"
            )
        if self.adapt and self.schedule in ("interleaved_zb", "zbv"):
            raise ValueError(f"--adapt gathers experts, which --schedule {self.schedule} cannot: take interleaved1f1b")
        if self.schedule.startswith("interleaved"):
            rounds = micro_batches // self.pp
            divides("--micro-batches", micro_batches, f"the {rounds} rounds of --schedule {self.schedule}", rounds)

    def changed(self, before: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Flags that differ from an earlier job's `asdict`, as text: those of `DEFINES_RUN`, and of `MAY_CHANGE`."""
        now = asdict(self)
        differs = [name for name in now if name in before and json.dumps(before[name]) != json.dumps(now[name])]
        words = {name: f"{flag(name)} {_shown(now[name])} (was {_shown(before[name])})" for name in differs}
        return [words[n] for n in differs if n in DEFINES_RUN], [words[n] for n in differs if n in MAY_CHANGE]

    def config(self) -> GPTConfig | BERTConfig | T5Config:
        """Sizes of the whole model."""
        moe = {
            "gate": self.gate,
            "shared": self.shared,
            "capacity": self.capacity_factor or None,
            "balance": Balance(self.aux_weight, over=self.balance),
        }
        config = GPTConfig(
            vocab=self.vocab or 256,
            eod=None if self.eod < 0 else self.eod,
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads or None,
            qk_norm=self.qk_norm,
            tied=not self.untied,
            hidden=self.hidden,
            seq_len=self.seq,
            moe_every=0 if self.dense else block_numbers(self.moe_layers) if self.moe_layers else self.moe_every,
            attention_bias=self.attention_bias,
            windows=block_numbers(self.windows) if self.windows else (),
            mtp=self.mtp,
            mtp_weight=self.mtp_weight,
            z_loss=self.z_loss,
            num_experts=self.experts,
            top_k=self.top_k,
            moe=moe,
        )
        return objective.config_of(self.objective, config)

    def lr_at(self, step: int) -> float:
        """Learning rate at a step, from 0."""
        return self.lr * factor(self.lr_schedule, step, self.steps, self.warmup, self.lr_end, self.lr_decay)


def _shown(value: Any) -> str:
    return "none" if value in ("", None) else str(value)


def parse(argv: list[str] | None = None, about: str | None = None) -> Job:
    """Job from a command line (None: this process's), and from the file of its --config.

    Raises:
        ValueError: an unknown flag or a value of the wrong type, on the command line or in the file.
    """
    return Job(**given(Job, CHOICES, argv, about))
