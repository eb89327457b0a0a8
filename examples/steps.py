"""A model on the job's meshes, its training steps and its evaluation."""

from __future__ import annotations

import math

import corpus
import torch
import torch.distributed as dist
from options import Job
from torch import Tensor
from torch.optim import AdamW, Optimizer
from turnout.dispatch import Meshes
from turnout.models import ParallelModel, parallel_model
from turnout.models.data_parallel import computed_in
from turnout.models.gpt import Block
from turnout.models.pipeline import Losses
from turnout.moe import GradScaler, MoE, balance_biases, param_groups


def build(job: Job, meshes: Meshes, dtype: torch.dtype = torch.float32) -> ParallelModel:
    """The model that this rank has a part of; the same for any mesh."""
    torch.manual_seed(job.seed)
    model = parallel_model(
        job.config(),
        meshes,
        micro_batches=job.micro_batches,
        schedule=job.schedule,
        data=job.data_parallel,  # pyright: ignore[reportArgumentType]
        bf16=job.bf16,
        recompute=job.recompute,  # pyright: ignore[reportArgumentType]
        dtype=dtype,
        overlap=job.overlap,
        wire=job.wire or None,
    )
    for part in model.parts if job.fp16 else ():
        computed_in(torch.float16, part, meshes.dense.device_type)
    return model


def adamw(model: ParallelModel, lr: float) -> AdamW:
    """Weight decay for matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = param_groups(matrices, weight_decay=0.1) + param_groups(others, weight_decay=0.0)
    return AdamW(groups, lr=lr, betas=(0.9, 0.95))


def batch(job: Job, text: Tensor, step: int, meshes: Meshes) -> Tensor:
    """This data rank's part of a step's batch, int64 [batch / dp, seq + 1], its micro-batches one after the other."""
    dp, device = meshes.dense["dp"], meshes.dense.device_type
    mine = {"rank": dp.get_local_rank(), "ranks": dp.size(), "micro_batches": job.micro_batches}
    return corpus.batch(text, job.seed, step, job.batch, job.seq, **mine).to(device)


def train(
    model: ParallelModel, optimizer: Optimizer, scaler: GradScaler, tokens: Tensor, lr: float, max_norm: float = 1.0
) -> tuple[Losses, Tensor]:
    """One step on tokens [B, S + 1]: the losses of this data rank, and the norm of the whole gradient."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    model.train()
    scale = scaler.scale(torch.ones((), device=tokens.device))  # 1 without float16
    losses = model.step(tokens[:, :-1], tokens[:, 1:], float(scale))
    scaler.unscale_(optimizer)
    norm = model.clip_grad_norm_(max_norm)
    scaler.step(optimizer)
    scaler.update()
    balance_biases(model)
    optimizer.zero_grad()
    return losses, norm


def evaluate(model: ParallelModel, text: Tensor, job: Job) -> float:
    """Bits per held-out byte, the same on all ranks."""
    model.eval()
    dp, device = model.meshes.dense["dp"], model.meshes.dense.device_type
    tokens = corpus.held_out(text, job.eval_size, job.seq, dp.get_local_rank(), dp.size()).to(device)
    parts = tokens.split(job.batch // dp.size())  # as many at a time as in training
    nats = torch.stack([model.evaluate(part[:, :-1], part[:, 1:]) * len(part) for part in parts]).sum()
    dist.all_reduce(nats, group=dp.get_group())
    return float(nats) / job.eval_size / math.log(2)


@torch.no_grad()
def gather(model: ParallelModel, loss: Tensor) -> tuple[float, list[list[int]], float]:
    """Over all ranks: mean loss, tokens per expert of each MoE layer, share dropped; in one all-reduce.

    Loads are of the last micro-batch.
    """
    config = model.parts[0].config
    layers = config.layers // config.moe_every if config.moe_every else 0
    table = torch.zeros(layers, 1 + config.num_experts, dtype=torch.float64, device=loss.device)
    for part in model.parts:
        for index, block in enumerate(part.blocks):
            if isinstance(block, Block) and isinstance(block.feed_forward, MoE):
                stats = block.feed_forward.stats
                table[index // config.moe_every, 0] = stats.dropped
                table[index // config.moe_every, 1:] = stats.tokens_per_expert
    flat = torch.cat([loss.double().reshape(1), table.flatten()])
    dist.all_reduce(flat)  # a layer's numbers come from the ranks of its stage, the loss from all
    rows = flat[1:].view_as(table).tolist()
    dropped = sum(row[0] for row in rows) / max(1, layers * model.meshes.tokens.size())
    return float(flat[0]) / dist.get_world_size(), [[round(n) for n in row[1:]] for row in rows], dropped
