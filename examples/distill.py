"""Train a dense student on what pretrain.py has trained with experts: from its weights, and from its logits.

    python examples/distill.py runs/pretrain runs/student --steps 200
    python examples/distill.py runs/pretrain runs/student --until 100     # no teacher after 100 steps
    torchrun --standalone --nproc-per-node 4 examples/distill.py runs/pretrain runs/student

The student has the teacher's blocks, with dense feed-forward networks of equal FLOPs in place of experts. Its
checkpoint is one of pretrain.py --dense: generate.py reads it, and pretrain.py --resume continues it
with the flags of the run.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import launch
import sources
import steps
import torch
import torch.distributed as dist
import trained
from command_line import Parser
from launch import say
from options import Job
from torch import Tensor
from torch.optim import Optimizer
from turnout.models import GPT, ParallelModel, checkpoint, distillation_loss, inherit, next_token_loss
from turnout.models.data import Prefetcher
from turnout.moe import aux_loss, sync_gradients


def distil(args: Namespace, device: torch.device) -> dict[str, Any]:
    """Train the student, save it, and return figures. All ranks call it."""
    found = trained.newest(args.teacher, device.type)
    wanted = {"steps": args.steps, "batch": args.batch, "eval_size": args.eval_size, "lr": args.lr, "ema": 0.0}
    job = replace(found.job, **wanted, seed=args.seed, out=str(args.out), epochs=10**9)
    job = replace(job, dense=True, ep=1, adapt=False, place=False, watch=False).fit(launch.RANKS)
    if args.until < 0 or not 0 <= args.alpha <= 1:
        raise ValueError(f"--until must be 0 or more, and --alpha in [0, 1]; got {args.until} and {args.alpha}")
    if checkpoint.newest(args.out):
        raise ValueError(f"{args.out} holds a checkpoint: name another folder")
    data = sources.Data.open(job)
    if launch.RANK == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        data.keep_tokenizer(args.out)
    student = steps.build(job, found.model.meshes)
    batches, held_out = data.batches(job, student.meshes), data.held_out(job, student.meshes)

    def bits(model: ParallelModel) -> float:
        return steps.evaluate(model, held_out.tokens, job, held_out.bytes_per_token)

    with found.averaged():
        left = [] if args.fresh else inherit(student.parts[0], found.model.parts[0])
        figures: dict[str, Any] = {"teacher": bits(found.model), "before": bits(student)}
        if not args.fresh:
            say(f"the student inherits all but {len(left)} matrices; held out {figures['before']:.3f} bits per byte")
        optimizer = steps.optimizer_of(student, job)
        with Prefetcher(batches, job.steps) as batch:
            for step in range(job.steps):
                alpha = args.alpha if step < (args.until or job.steps) else 0.0
                loss = one_step(student, found.model, optimizer, batch(step).to(device), job, step, alpha)
                if (step + 1) % job.log_every == 0:
                    say(f"step {step + 1} of {job.steps}: loss {loss:.3f}")
    figures["after"] = bits(student)
    optimizer.zero_grad()
    checkpoint.save(args.out, student.parts, optimizer, job.steps, {"job": asdict(job), "text": data.fingerprint})
    return figures


def one_step(
    student: ParallelModel,
    teacher: ParallelModel,
    optimizer: Optimizer,
    tokens: Tensor,
    job: Job,
    step: int,
    alpha: float,
) -> float:
    """A training step on tokens int64 [B, S + 1], this rank's part; returns its loss, the mean over ranks."""
    inputs, targets, model = tokens[:, :-1], tokens[:, 1:], student.parts[0]
    assert isinstance(model, GPT)
    for group in optimizer.param_groups:
        group["lr"] = job.lr_at(step)
    logits = model.train()(inputs, targets=targets)
    if alpha:
        with torch.no_grad():
            said = teacher.eval().parts[0](inputs)
        loss = distillation_loss(logits, said, targets, alpha)
    else:
        loss = next_token_loss(logits, targets)
    (loss + aux_loss(model)).backward()
    sync_gradients(student, student.meshes)
    student.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach()
    dist.all_reduce(mean)
    if not math.isfinite(mean):
        raise steps.NonFiniteError(
            f"step {step + 1}: the loss is NaN or infinite. Nothing is saved: try a smaller --lr"
        )
    return float(mean) / launch.RANKS


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("teacher", type=Path, help="--out of the run that trained the teacher")
    parser.add_argument("out", type=Path, help="folder for the student")
    parser.add_argument("--steps", type=int, default=200, help="number of optimizer steps")
    parser.add_argument("--batch", type=int, default=32, help="number of sequences in a step")
    parser.add_argument("--lr", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--alpha", type=float, default=0.25, help="share of the teacher in the loss")
    parser.add_argument("--until", type=int, default=0, help="number of steps with the teacher's loss; 0 takes all")
    parser.add_argument("--fresh", action="store_true", help="let the student begin with random weights")
    parser.add_argument("--eval-size", type=int, default=128, help="number of held-out sequences")
    parser.add_argument("--seed", type=int, default=0, help="seed of new weights and of the order of the data")
    return trained.run(parser, lambda args, device: json.dumps(distil(args, device)))


if __name__ == "__main__":
    sys.exit(main())
