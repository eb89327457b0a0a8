"""Model, optimizer, training step and evaluation of the main job, on any mesh."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from forced_balance import force_balance
from launch import say
from objective import HELD_OUT, Pair, asked, pair
from options import Job
from sources import Rows
from spikes import Spike, Spikes
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from turnout.dispatch import Meshes
from turnout.models import EMA, Muon, ParallelModel, muon_groups, next_token_loss, parallel_model
from turnout.models import recompute as recomputing
from turnout.models.data_parallel import computed_in
from turnout.models.loss import IGNORED
from turnout.moe import GradScaler, load, param_groups, update_expert_biases
from turnout.moe.experts.sharded import whole
from turnout.moe.layer import moe_layers


def build(job: Job, meshes: Meshes, dtype: torch.dtype = torch.float32) -> ParallelModel:
    """Build this rank's part of the model. Initial values are the same on any mesh."""
    torch.manual_seed(job.seed)
    model = parallel_model(
        job.config(),
        meshes,
        micro_batches=job.micro_batches,
        accumulate=job.accumulate,
        schedule=job.schedule,
        stages_per_rank=job.virtual or None,
        data=job.data_parallel,  # pyright: ignore[reportArgumentType]
        bf16=job.bf16,
        recompute="none" if job.recompute == "sqrt" else job.recompute,  # pyright: ignore[reportArgumentType]
        cp_attention=job.cp_attention or None,  # pyright: ignore[reportArgumentType]
        compile=job.compile,
        dtype=dtype,
        overlap=None if job.adapt and job.overlap == 1 else job.overlap,
        wire=job.wire or None,
        parallelism="auto" if job.adapt else None,
    )
    for part in model.parts if job.fp16 else ():
        computed_in(torch.float16, part, meshes.dense.device_type)
    for part in model.parts if job.recompute == "sqrt" else ():
        recomputing(part, "full", every="sqrt")
    for layer in moe_layers(model).values() if job.fp8 else ():
        layer.experts.precision = "fp8"
    if job.forced_balance:
        force_balance(model)
    return model


def optimizer_of(model: ParallelModel, job: Job) -> Optimizer:
    """The job's optimizer, with weight decay for matrices alone."""
    if job.optimizer == "muon":
        return Muon(muon_groups(model, weight_decay=0.1), lr=job.lr)
    return AdamW(param_groups(model, weight_decay=0.1), lr=job.lr, betas=(0.9, 0.95))


def average_of(model: ParallelModel, job: Job) -> EMA | None:
    """The average of the weights that the job keeps, if it does."""
    return EMA(model.parts, job.ema) if job.ema else None


def saved(model: ParallelModel, ema: EMA | None) -> list[nn.Module]:
    """The modules in a checkpoint."""
    return [*model.parts, ema] if ema else [*model.parts]


class Step(NamedTuple):
    """Result of a training step, the same on all ranks."""

    loss: float  # mean over the batch, without the balance losses
    norm: float  # norm of the whole gradient before clipping
    nonfinite: str  # names of values that were NaN or infinite, so that the step was skipped; "" if there were none
    overflow: bool = False  # float16 overflow: harmless, the next step has a smaller scale
    spike: Spike | None = None  # set if the loss is far above the losses before


def train(
    model: ParallelModel,
    optimizer: Optimizer,
    scaler: GradScaler,
    tokens: Tensor | Pair,
    lr: float,
    max_norm: float = 1.0,
    spikes: Spikes | None = None,
) -> Step:
    """Run one training step on tokens, int64 [B, S + 1], or another task of this data rank's part of the batch.

    If a loss or gradient is not finite on any rank, no rank's optimizer steps, and the weights stay as they are.
    `spikes` compares the loss with the losses before.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    model.train()
    inputs, targets = pair(tokens)
    scale = scaler.get_scale()  # 1 without float16
    losses = model.step(inputs, targets, scale)
    scaler.unscale_(optimizer)
    norm = model.clip_grad_norm_(max_norm)
    means = torch.stack([x.double().to(targets.device) for x in (losses.task, losses.aux, norm)])
    dist.all_reduce(means)  # NaN or infinity of one rank reaches all of them
    task, aux, norm = (means / dist.get_world_size()).tolist()
    wrong = {"the loss": task, "the balance loss": aux, "the norm of the gradient": norm}
    nonfinite = " and ".join(what for what, value in wrong.items() if not math.isfinite(value))
    spike = None
    if not nonfinite:
        if spikes:
            spike = spikes.look(task, losses.task, model, scale=min(1.0, max_norm / norm) if norm else 1.0)
        scaler.step(optimizer)
    scaler.update()
    update_expert_biases(model)
    optimizer.zero_grad()
    # with a scale below 1 the unscaled gradients overflow: a smaller scale would not help
    overflow = math.isfinite(task + aux) and 1 <= scaler.get_scale() < scale
    return Step(task, norm, nonfinite, overflow, spike)


class NonFiniteError(ArithmeticError):
    """The job cannot continue because of NaN or infinity."""


@dataclass
class Skips:
    """Counts steps that were skipped because of NaN or infinity, and raises an error for too many.

    Attributes:
        policy: "stop" raises at the first one, "skip" does not.
        most: number of skipped steps in a row that raises.
        total: number of steps skipped so far, including overflows of float16.
    """

    policy: str
    most: int
    total: int = 0
    in_a_row: int = 0

    def add(self, number: int, step: Step) -> None:
        """Count a step.

        Raises:
            NonFiniteError: on every rank.
        """
        if not step.nonfinite:
            self.in_a_row = 0
            return
        self.total += 1
        if step.overflow:
            return
        self.in_a_row += 1
        found = f"step {number}: {step.nonfinite} is NaN or infinite on some rank"
        remedy = "Nothing was saved since. Try a smaller --lr, a longer --warmup or other data"
        if self.policy == "stop":
            raise NonFiniteError(f"{found}. {remedy}; --on-nonfinite skip skips such steps")
        if self.in_a_row >= self.most:
            raise NonFiniteError(f"{found}, as in {self.in_a_row} steps in a row (--max-skipped). {remedy}")
        say(f"{found}; it is skipped. Steps skipped: {self.in_a_row} in a row, {self.total} in all")


def evaluate(
    model: ParallelModel, tokens: Tensor, job: Job, bytes_per_token: float = 1.0, ema: EMA | None = None
) -> float:
    """Loss of held-out tokens, this data rank's int64 [n, S + 1], in bits per byte, the same on all ranks.

    It is of the average weights if there are some.

    Raises:
        NonFiniteError: on every rank.
    """
    model.eval()
    dp, device = model.meshes.dense["dp"], model.meshes.dense.device_type
    parts = tokens.to(device).split(job.batch // job.accumulate // dp.size())  # as in training, for the same memory
    with ema.applied() if ema else nullcontext():
        nats = torch.stack([model.evaluate(part[:, :-1], part[:, 1:]) * len(part) for part in parts]).sum()
    dist.all_reduce(nats, group=dp.get_group())
    return _finite(float(nats) / job.eval_size / bytes_per_token / math.log(2))


def held_out_figures(model: ParallelModel, held_out: Rows, job: Job, ema: EMA | None = None) -> dict[str, float]:
    """Figures of held-out rows, the same on all ranks: bits per byte, or loss and accuracy of predicted tokens.

    The loss is in nats per predicted token, and the accuracy is the share of them that has the highest logit. Bits per
    byte are for next tokens alone: the other models give a text no probability.

    Raises:
        NonFiniteError: on every rank.
    """
    if job.objective == "clm":
        return {"bits_per_byte": evaluate(model, held_out.tokens, job, held_out.bytes_per_token, ema)}
    model.eval()
    dp, device = model.meshes.dense["dp"], model.meshes.dense.device_type
    numbers = range(job.eval_size)[dp.get_local_rank() :: dp.size()]
    inputs, targets = pair(asked(job, held_out.tokens, HELD_OUT, numbers)).to(device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens predicted well, tokens predicted
    rows = job.batch // job.accumulate // dp.size()  # as in training, for the same memory
    with ema.applied() if ema else nullcontext():
        for *x, y in zip(*(each.split(rows) for each in (*inputs, targets)), strict=True):
            if (logits := model.logits(tuple(x))) is not None:
                logits, own = whole(logits), model.split.own(y)
                known, total = own != IGNORED, next_token_loss(logits, own, positions=1)  # a part may have no target
                sums += torch.stack([total, (logits.argmax(-1) == own)[known].sum(), known.sum()])
    for group in (model.meshes.dense["pp"], model.meshes.replicas):  # one stage has logits
        dist.all_reduce(sums, group=group.get_group())
    nats, right, number = sums.tolist()
    return {"loss": _finite(nats / number), "accuracy": right / number}


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise NonFiniteError(
            "the loss of held-out text is NaN or infinite, so the model is not saved. Try a smaller --lr or other data"
        )
    return loss


def gather(model: ParallelModel) -> tuple[list[list[int]], list[int]]:
    """Tokens per expert, and dropped assignments, of each MoE layer since the last call.

    They are sums over all ranks, steps and micro-batches. All ranks call it.
    """
    config, meshes = model.parts[0].config, model.meshes
    names = config.moe_layers()
    table = torch.zeros(len(names), 1 + config.num_experts, dtype=torch.int64)
    for name, found in load(model, meshes).items():
        tokens = found.tokens_per_expert
        row = table[names.index(name.split(".", 2)[2])]  # behind the name of the part
        row[0], row[1:] = (found.dropped * tokens.sum()).round(), tokens
    table = table.to(meshes.dense.device_type)
    dist.all_reduce(table, group=meshes.dense["pp"].get_group())  # each stage has layers of its own
    rows = table.tolist()
    return [row[1:] for row in rows], [row[0] for row in rows]
