"""Train a Hugging Face MoE model with its experts spread over ranks, and save it as transformers reads it.

    torchrun --standalone --nproc-per-node 4 examples/finetune_hf.py
    torchrun --standalone --nproc-per-node 4 examples/finetune_hf.py --family qwen3_moe --steps 50
    python examples/finetune_hf.py --model runs/finetune_hf --steps 20     # continue from the saved model, on one rank

The model is a small new one of the family, with bytes as tokens: nothing is downloaded. The text is the source of
Python's standard library, or the files of --data. Losses do not depend on the number of ranks.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from typing import Any

import corpus
import launch
import torch
import torch.distributed as dist
from command_line import Parser, at_least
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import AdamW
from turnout.moe import Balance, aux_loss, clip_grad_norm_, parallelize, param_groups, sync_gradients
from turnout.moe.layer import moe_layers

try:
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
    from turnout.models.hf import replace_moe, save_pretrained
except ModuleNotFoundError as error:
    launch.missing(error, "hf")

# Sizes of a small model. Families have different names for some of them, so each takes the names that it knows.
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "max_position_embeddings": 512,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def build(job: Namespace) -> nn.Module:
    """Build or load the model with transformers."""
    if job.model:
        return AutoModelForCausalLM.from_pretrained(job.model)
    known = {name: size for name, size in SIZES.items() if hasattr(AutoConfig.for_model(job.family), name)}
    torch.manual_seed(job.seed)  # the same weights on every rank
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(job.family, **known))


def train(job: Namespace, text: tuple[Tensor, Tensor], device: torch.device) -> dict[str, Any]:
    """Train, save to `job.out`, load it with transformers, and return the losses."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if job.batch % (ranks * job.accumulate):
        raise ValueError(
            f"--batch ({job.batch}) must be a multiple of {ranks * job.accumulate} = {ranks} ranks x --accumulate "
            f"({job.accumulate})"
        )
    mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("ep",))
    model = build(job).to(device)
    parallelize(replace_moe(model), mesh)
    for layer in moe_layers(model).values():
        layer.balance = Balance(job.aux_weight, over="sequence")  # replaces the balance loss of the family
    optimizer = AdamW(param_groups(model), lr=job.lr, betas=(0.9, 0.95))

    losses, tokens = [], job.batch * job.seq  # tokens of all ranks in a step, to divide sums of losses by
    for step in range(job.steps):
        model.train()
        mine = corpus.batch(text[0], job.seed, step, job.batch, job.seq, rank, ranks, job.accumulate).to(device)
        total = torch.zeros((), device=device)
        for part in mine.chunk(job.accumulate):
            loss = model(input_ids=part, labels=part, num_items_in_batch=tokens).loss
            (loss * ranks + aux_loss(model) / job.accumulate).backward()  # sync_gradients takes the mean over ranks
            total += loss.detach()
        sync_gradients(model, mesh)
        clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(float(total))
        if (step + 1) % job.log_every == 0 or step + 1 == job.steps:
            launch.say(f"step {step + 1}: loss {losses[-1]:.4f} nats per byte")

    before = evaluate(job, model, corpus.held_out(text[1], job.batch, job.seq, rank, ranks).to(device))
    dist.all_reduce(before)
    save_pretrained(model, job.out)  # the model is unchanged, and training could continue
    figures: dict[str, Any] = {"losses": losses, "held_out": float(before) / tokens}
    if rank == 0:  # transformers alone loads the files
        plain = AutoModelForCausalLM.from_pretrained(job.out).to(device)
        after = evaluate(job, plain, corpus.held_out(text[1], job.batch, job.seq, 0, 1).to(device))
        figures["held_out_by_transformers"] = float(after) / tokens
    return figures


@torch.no_grad()
def evaluate(job: Namespace, model: nn.Module, held_out: Tensor) -> Tensor:
    """Sum of the losses of this rank's sequences, int64 [n, S + 1], a few sequences at a time."""
    model.eval()
    parts = held_out.split(max(1, job.batch // job.accumulate))
    return torch.stack([model(input_ids=part, labels=part, num_items_in_batch=1).loss for part in parts]).sum()


def parse(argv: list[str] | None = None) -> Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--family", default="mixtral", help="model_type of a model in docs/guides/hf_families.md")
    parser.add_argument("--model", help="folder of a saved model to start from, with bytes as tokens")
    parser.add_argument("--out", default="runs/finetune_hf", help="folder to save the trained model to")
    parser.add_argument("--data", nargs="+", help="text files and folders to train on (default: Python's own source)")
    parser.add_argument("--steps", type=int, default=100, help="number of optimizer steps")
    parser.add_argument("--batch", type=int, default=32, help="number of sequences in a step, on all ranks together")
    parser.add_argument("--accumulate", type=int, default=2, help="number of micro-batches in a step")
    parser.add_argument("--seq", type=int, default=128, help="number of bytes in a sequence")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--aux-weight", type=float, default=1e-2, help="weight of the load-balancing loss")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order of the data")
    parser.add_argument("--log-every", type=int, default=10, help="steps between two log lines")
    return parser.parse_args(argv)


def check(job: Namespace) -> None:
    """Raise a ValueError for numbers, a family or a folder that no model can be trained with."""
    at_least(1, job, "steps", "batch", "accumulate", "seq", "log_every")
    if not job.model and job.family not in CONFIG_MAPPING:
        raise ValueError(f"--family {job.family}: no such family; docs/guides/hf_families.md lists those with experts")
    if job.model and not Path(job.model).is_dir():
        raise ValueError(f"--model {job.model}: there is no such folder; name the --out of an earlier run")


def main() -> int:
    try:
        job = parse()
        check(job)
        text = corpus.read(corpus.text_files(job.data) if job.data else corpus.standard_library(), job.seq)
        with launch.process_group(timedelta(seconds=300)) as device:
            figures = train(job, text, device)
    except ValueError as error:
        launch.once(str(error))
        return 2
    if launch.RANK == 0:
        print(json.dumps({**figures, "losses": figures["losses"][-1:], "saved": job.out}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
