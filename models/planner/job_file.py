"""The TOML file of `examples/pretrain.py`: read for its model, written for a layout."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from ...moe import Balance
from ..blocks import block_numbers
from ..gpt import GPTConfig
from .architecture import Architecture
from .layout import Layout
from .update import ADAMW, Update

SIZES = (
    *("seq", "dim", "layers", "heads", "hidden", "experts", "top_k", "kv_heads", "moe_every", "qk_norm", "vocab"),
    *("attention_bias", "mtp"),
)
MODEL = (*SIZES, "objective", "moe_layers", "windows", "untied", "gate", "shared", "capacity_factor", "dense")
LAYOUT = (
    "pp",
    "cp",
    "cp_attention",
    "tp",
    "ep",
    "etp",
    "micro_batches",
    "virtual",
    "schedule",
    "data_parallel",
    "recompute",
)
OTHERS = (  # flags of the job that change neither memory nor the time of a step, or nothing that the planner models
    *("steps", "out", "data", "resume", "allow_changes", "elastic", "seed", "balance", "aux_weight", "overlap", "wire"),
    *("timeout", "lr", "warmup", "on_nonfinite", "max_skipped", "check_every", "eval_every", "eval_size"),
    *("accumulate", "compile", "forced_balance", "optimizer", "lr_schedule", "lr_end", "lr_decay", "ema"),
    *("save_every", "keep", "log_every", "peak_tflops", "profile", "tensorboard", "plan", "ranks", "cluster"),
    *("links", "tokenizer", "epochs", "eod", "join_documents", "mtp_weight", "z_loss"),
    *("adapt", "place", "watch", "fp8"),
)


class JobFile(NamedTuple):
    """Settings that a job file gives."""

    model: Architecture
    batch: int  # sequences in a step
    dtype: str
    layout: tuple[str, ...]  # names of the layout's keys in the file
    update: Update

    @classmethod
    def read(cls, path: str | Path) -> JobFile:
        """Read a file.

        Raises:
            ValueError: the file is no TOML, has keys that are no flags of the job, or trains another model than a GPT.
        """
        try:
            given = {name.replace("-", "_"): value for name, value in tomllib.loads(Path(path).read_text()).items()}
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"--config {path}: {error}") from None
        known = {*MODEL, *LAYOUT, *OTHERS, "batch", "bf16", "fp16"}
        if unknown := sorted(given.keys() - known):
            raise ValueError(
                f"--config {path}: unknown {', '.join(unknown)}; the keys are flags of examples/pretrain.py"
            )
        if (task := given.get("objective", "clm")) != "clm":
            raise ValueError(f"--config {path}: objective is {task}, and the planner knows GPTs alone, of clm")
        names = {"seq": "seq_len", "experts": "num_experts"}
        sizes = {names.get(key, key): given[key] for key in SIZES if key in given}
        sizes["kv_heads"] = given.get("kv_heads") or None  # 0: as many as heads
        sizes["tied"] = not given.get("untied")
        if given.get("moe_layers"):
            sizes["moe_every"] = block_numbers(given["moe_layers"])
        sizes["windows"] = block_numbers(given["windows"]) if given.get("windows") else ()
        kind, _, size = str(given.get("tokenizer", "")).partition(":")
        sizes["vocab"] = given.get("vocab") or (int(size) if kind == "bpe" and size.isdecimal() else 256)
        if given.get("dense"):
            sizes["moe_every"] = 0
        moe = {
            "capacity": given.get("capacity_factor") or None,
            "balance": Balance(0.0),
            "shared": given.get("shared", 0),
        }
        config = GPTConfig(**sizes, moe=moe)
        dtype = "bf16" if given.get("bf16") else "fp16" if given.get("fp16") else "fp32"
        stated = tuple(key for key in LAYOUT if key in given)
        update = Update(given.get("optimizer", "adamw"), bool(given.get("ema")))
        return cls(Architecture.of(config), given.get("batch", 32), dtype, stated, update)


def toml(model: Architecture, layout: Layout, batch: int, update: Update = ADAMW) -> str:
    """Contents of a job file. Settings that the job has no flags for stand in comments."""
    values: dict[str, Any] = {
        "batch": batch,
        "vocab": model.vocab if model.vocab != 256 else None,
        "seq": model.seq,
        "dim": model.dim,
        "layers": model.layers,
        "heads": model.heads,
        "kv-heads": model.kv_heads if model.kv_heads != model.heads else None,
        "moe-every": model.moe_every if model.experts and isinstance(model.moe_every, int) else None,
        "moe-layers": None if isinstance(model.moe_every, int) else ",".join(map(str, model.moe_every)),
        "qk-norm": model.qk_norm or None,
        "windows": ",".join(map(str, model.windows)) or None,
        "attention-bias": model.attention_bias or None,
        "untied": not model.tied or None,
        "mtp": model.mtp or None,
        "hidden": model.hidden if model.experts else model.ffn,
        "experts": model.experts or None,
        "top-k": model.top_k or None,
        "shared": (model.experts and model.shared) or None,
        "dense": None if model.experts else True,
        "capacity-factor": model.capacity or None,
        "pp": layout.pp,
        "cp": layout.cp if layout.cp > 1 else None,
        "cp-attention": layout.cp_attention,
        "tp": layout.tp,
        "ep": layout.ep,
        "etp": layout.etp,
        "micro-batches": layout.micro_batches,
        "schedule": layout.schedule,
        "virtual": layout.virtual if layout.pp > 1 else None,
        "data-parallel": layout.data,
        "recompute": layout.recompute,
        "bf16": layout.dtype == "bf16" or None,
        "fp16": layout.dtype == "fp16" or None,
        "optimizer": update.optimizer if update.optimizer != "adamw" else None,
        "ema": 0.999 if update.ema else None,
    }
    if not model.experts:  # a dense block of the job is (top_k + shared) * hidden wide
        values["top-k"] = 1
    lines = [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
    return "\n".join([*_not_in_the_job(model), *lines]) + "\n"


def _not_in_the_job(model: Architecture) -> list[str]:
    """Comments on the parts of the model that examples/pretrain.py cannot build by flags."""
    differs = []
    if model.plain:
        differs.append("GELU, LayerNorm, biases and learned positions: the job's model has SwiGLU, RMSNorm and RoPE")
    elif not model.gated:
        differs.append('GELU without a gate: GPTConfig(moe=dict(experts="gelu"))')
    if 0 < model.moe_blocks < model.layers and model.ffn != model.visited:
        differs.append(
            f"dense blocks {model.ffn:,} wide: the job's are as wide as all experts of a token, {model.visited:,}"
        )
    if model.head_size and model.head_size * model.heads != model.dim:
        differs.append(f"heads {model.head_size} wide: GPTConfig(head_dim={model.head_size})")
    if model.capacity:
        differs.append("padding: GPTConfig(moe=dict(capacity=Capacity(..., pad=True)))")
    return (
        ["# Planned with settings that the job has no flags for:", *(f"# - {what}" for what in differs)]
        if differs
        else []
    )


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def start_commands(layout: Layout, ranks_per_node: int, file: str) -> list[str]:
    """Shell commands that start the job: torchrun, and with several nodes SLURM as well."""
    per_node = min(layout.ranks, ranks_per_node)
    nodes = -(-layout.ranks // per_node)
    if nodes == 1:
        return [f"torchrun --standalone --nproc-per-node {per_node} examples/pretrain.py --config {file}"]
    return [
        f"NODES={nodes} GPUS={per_node} HEAD=node0:29500 bash examples/multi_node.sh --config {file}  # on each node",
        f"GPUS={per_node} sbatch --nodes={nodes} --gpus-per-node={per_node} examples/slurm.sh --config {file}",
    ]
