"""Train a Hugging Face MoE model with its experts spread over ranks, and save it as transformers reads it.

    torchrun --standalone --nproc-per-node 4 examples/finetune_hf.py
    torchrun --standalone --nproc-per-node 4 examples/finetune_hf.py --family qwen3_moe --steps 50
    python examples/finetune_hf.py --model runs/finetune_hf --steps 20     # go on with what it wrote, on one rank

The model is a small new one of the family, whose tokens are bytes: nothing is downloaded. The text is the source of the
running Python's standard library, or --data. Losses do not depend on the number of ranks.
"""

from __future__ import annotations

import argparse
import json
import sys
from argparse import Namespace
from datetime import timedelta
from typing import Any

import corpus
import launch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import AdamW
from transformers import AutoConfig, AutoModelForCausalLM
from turnout.models.hf import replace_moe, save_pretrained
from turnout.moe import Balance, MoE, aux_loss, clip_grad_norm_, parallelize, param_groups, sync_gradients

# Of a small model. A family has its own names for some of these, and takes those that it knows.
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
    """The model, as transformers has it."""
    if job.model:
        return AutoModelForCausalLM.from_pretrained(job.model)
    known = {name: size for name, size in SIZES.items() if hasattr(AutoConfig.for_model(job.family), name)}
    torch.manual_seed(job.seed)  # alike on every rank
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(job.family, **known))


def train(job: Namespace, text: tuple[Tensor, Tensor], device: torch.device) -> dict[str, Any]:
    """Train, save to `job.out`, and read it back: the losses."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if job.batch % (ranks * job.accumulate):
        raise ValueError(f"--batch {job.batch} does not split over {ranks} ranks x --accumulate {job.accumulate}")
    mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("ep",))
    model = build(job).to(device)
    parallelize(replace_moe(model), mesh)
    for layer in (module for module in model.modules() if isinstance(module, MoE)):
        layer.balance = Balance(job.aux_weight, over="sequence")  # in place of the family's loss, if it has one
    optimizer = AdamW(param_groups(model), lr=job.lr, betas=(0.9, 0.95))

    losses, tokens = [], job.batch * job.seq  # of all ranks in a step: what a sum of losses is divided by
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
            launch.say(f"step {step + 1}: loss {losses[-1]:.4f} nats a byte")

    before = evaluate(job, model, corpus.held_out(text[1], job.batch, job.seq, rank, ranks).to(device))
    dist.all_reduce(before)
    save_pretrained(model, job.out)  # and the training could go on
    figures: dict[str, Any] = {"losses": losses, "held_out": float(before) / tokens}
    if rank == 0:  # the files are transformers' own
        plain = AutoModelForCausalLM.from_pretrained(job.out).to(device)
        after = evaluate(job, plain, corpus.held_out(text[1], job.batch, job.seq, 0, 1).to(device))
        figures["held_out_by_transformers"] = float(after) / tokens
    return figures


@torch.no_grad()
def evaluate(job: Namespace, model: nn.Module, held_out: Tensor) -> Tensor:
    """The sum of the losses of this rank's sequences [n, S + 1], of a few at a time."""
    model.eval()
    parts = held_out.split(max(1, job.batch // job.accumulate))
    return torch.stack([model(input_ids=part, labels=part, num_items_in_batch=1).loss for part in parts]).sum()


def parse(argv: list[str] | None = None) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="mixtral", help="model_type of a model in docs/guides/hf_families.md")
    parser.add_argument("--model", help="a checkpoint of transformers, in place of a new model; its tokens are bytes")
    parser.add_argument("--out", default="runs/finetune_hf", help="folder of the trained model")
    parser.add_argument("--data", nargs="+", help="text files and folders; none: the standard library's source")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32, help="sequences in a step, on all ranks together")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches in a step")
    parser.add_argument("--seq", type=int, default=128, help="bytes in a sequence")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--aux-weight", type=float, default=1e-2, help="of the balance loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=10)
    return parser.parse_args(argv)


def main() -> int:
    job = parse()
    try:
        text = corpus.read(corpus.text_files(job.data) if job.data else corpus.standard_library(), job.seq)
        with launch.process_group(timedelta(seconds=300)) as device:
            figures = train(job, text, device)
    except ValueError as error:
        launch.say(str(error), every_rank=True)
        return 2
    if launch.RANK == 0:
        print(json.dumps({**figures, "losses": figures["losses"][-1:], "saved": job.out}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
