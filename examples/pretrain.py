"""Train a byte-level GPT with mixture-of-experts blocks, its experts spread over the ranks.

    torchrun --standalone --nproc-per-node 4 examples/pretrain.py --steps 300
    python examples/pretrain.py --dense          # one rank, and the dense twin of equal FLOPs per token

The text is the source of the running Python's standard library, or --data. The batches, and so the losses,
do not depend on the number of ranks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import corpus
import launch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from launch import say
from report import Log, draw, tensorboard
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer
from tqdm import tqdm
from turnout.dispatch.wire import WIRES, Wire
from turnout.models import GPT, GPTConfig, checkpoint
from turnout.moe import MoE, aux_loss, balance_biases, clip_grad_norm_, parallelize, param_groups, sync_gradients

STOPPED = 143  # what a shell calls ended by SIGTERM


@dataclass(frozen=True)
class Job:
    steps: int = 200  # optimizer steps in all
    out: str = "runs/pretrain"  # folder of checkpoints and report.png
    data: tuple[str, ...] = ()  # text files and folders; none: the standard library's source
    resume: bool = False  # go on from the newest checkpoint in --out, on any number of ranks
    tensorboard: bool = False  # scalars and histograms in --out/tensorboard
    bf16: bool = False  # autocast to bfloat16
    dense: bool = False  # no experts: the dense twin
    seed: int = 0
    batch: int = 32  # sequences in a step, on all ranks together
    seq: int = 128  # bytes in a sequence
    dim: int = 128
    layers: int = 4
    heads: int = 4
    hidden: int = 256  # width of one expert
    experts: int = 8
    top_k: int = 2
    gate: str = "topk"
    capacity_factor: float = 0.0  # 0: no token is dropped
    balance: str = "global"
    aux_weight: float = 1e-2
    ep: int = 0  # ranks that share the experts; 0: all of them
    overlap: int = 1  # chunks of a batch: the next one travels while the experts compute this one
    wire: str = ""  # rows travel in bf16 or fp8; "": as they are
    lr: float = 4e-3
    warmup: int = 20
    eval_every: int = 50
    eval_size: int = 128  # held-out sequences read each time
    save_every: int = 100  # and at the end
    keep: int = 3  # checkpoints

    def check(self, ranks: int) -> int:
        """The ranks that share the experts, or ValueError: before any rank waits for another."""
        ep = self.ep or math.gcd(ranks, self.experts)
        for what, whole, part in (
            ("--batch", self.batch, ranks),
            ("--eval-size", self.eval_size, ranks),
            ("the number of ranks", ranks, ep),
            ("--experts", self.experts, ep),
        ):
            if whole % part:
                raise ValueError(
                    f"{what} ({whole}) must be a multiple of {part}: {ranks} ranks, {ep} share the experts"
                )
        if self.steps < 1:
            raise ValueError(f"--steps must be positive; got {self.steps}")
        if self.overlap < 1 or self.wire not in ("", *WIRES):
            raise ValueError(
                f"--overlap must be positive, --wire one of {', '.join(WIRES)}; got {self.overlap}, {self.wire!r}"
            )
        return ep

    def model(self) -> GPT:
        """The model, alike on every rank."""
        torch.manual_seed(self.seed)
        moe = {
            "gate": self.gate,
            "capacity_factor": self.capacity_factor or None,
            "balance": self.balance,
            "aux_loss_weight": self.aux_weight,
        }
        return GPT(
            GPTConfig(
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
        )

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))


def train(job: Job, ep: int, text: tuple[Tensor, Tensor], device: torch.device) -> int:
    """The exit status: 0, or STOPPED after SIGTERM."""
    ranks, out, stop = dist.get_world_size(), Path(job.out), launch.Stop()
    mesh = init_device_mesh(device.type, (ranks // ep, ep), mesh_dim_names=("edp", "ep"))
    model = job.model().to(device)
    size = {"parameters": sum(p.numel() for p in model.parameters()), "active_parameters": model.active_parameters()}
    parallelize(model, mesh, overlap=job.overlap, wire=cast(Wire, job.wire) or None)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        param_groups(matrices, weight_decay=0.1) + param_groups(others, weight_decay=0.0), lr=job.lr, betas=(0.9, 0.95)
    )
    first, log = begin(job, model, optimizer)
    board = tensorboard(out, first) if job.tensorboard and launch.RANK == 0 else None

    mine = {"rank": launch.RANK, "ranks": ranks}
    seconds, stopping = 0.0, False
    bar = tqdm(total=job.steps, initial=first, disable=launch.RANK != 0, file=sys.stderr)
    for step in range(first, job.steps):
        start = time.perf_counter()
        stop.ask()
        model.train()
        tokens = corpus.batch(text[0], job.seed, step, job.batch, job.seq, **mine).to(device)
        for group in optimizer.param_groups:
            group["lr"] = job.lr_at(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=job.bf16):
            loss = cross_entropy(model, tokens)
        (loss + aux_loss(model)).backward()
        sync_gradients(model, mesh)
        norm = clip_grad_norm_(model, 1.0)
        optimizer.step()
        balance_biases(model)
        optimizer.zero_grad()
        stopping = stop.answer() and step + 1 < job.steps
        seconds += time.perf_counter() - start

        done = step + 1
        last = stopping or done == job.steps
        if done % 10 == 0 or last:
            log.add(done, *gather(model, loss.detach()))
            if not math.isfinite(log.loss[-1]):
                raise ValueError(f"the loss is {log.loss[-1]} at step {done}: try a smaller --lr or a longer --warmup")
            rate = (done - first) * job.batch * job.seq / seconds
            bar.set_postfix_str(f"loss {log.loss[-1]:.3f}, {rate:.0f} tokens/s, {log.summary()}")
            if board:
                board.step(log, model, {"lr": job.lr_at(step), "gradient norm": float(norm), "tokens per s": rate})
        bar.update()
        if done % job.eval_every == 0 or done == job.steps:
            log.add_held_out(done, evaluate(model, text[1], job, device, mine))
            if board:
                board.held_out(log)
        if done % job.save_every == 0 or last:
            checkpoint.save(out, model, optimizer, done, {"log": asdict(log), "job": asdict(job)}, random_state(device))
            checkpoint.prune(out, job.keep)
        if stopping:
            break
    bar.close()
    if board:
        board.close()
    if stopping:
        say(f"stopped by SIGTERM after step {done}; it is saved, and --resume goes on from there")
        return STOPPED
    if launch.RANK == 0:
        draw(log, out / "report.png")
        (out / "log.json").write_text(json.dumps(asdict(log)))
        result = {
            "steps": job.steps,
            "loss": log.loss[-1],
            "val_bpb": log.val_bpb[-1],
            "tokens_per_s": round((job.steps - first) * job.batch * job.seq / seconds) if seconds else None,
            "seconds": round(seconds, 1),
            "dropped": log.dropped[-1],
            "imbalance": log.imbalance[-1],
            "ranks": ranks,
            **size,
        }
        print(json.dumps(result), flush=True)
    return 0


def begin(job: Job, model: GPT, optimizer: Optimizer) -> tuple[int, Log]:
    """The first step, and the curves so far: of the newest checkpoint where the job goes on with one."""
    out = Path(job.out)
    again = launch.restarted()
    loaded = checkpoint.load_newest(out, model, optimizer) if job.resume or again else None
    if loaded:
        if loaded.rank_state:
            torch.set_rng_state(loaded.rank_state["cpu"])
            if "cuda" in loaded.rank_state:
                torch.cuda.set_rng_state(loaded.rank_state["cuda"])
        else:
            torch.manual_seed(hash((job.seed, loaded.step, launch.RANK)))
            say("another number of ranks: the random numbers of gates start anew")
        say(f"going on after step {loaded.step}")
        return loaded.step, Log(**loaded.extra["log"])
    if job.resume and not again:
        raise ValueError(f"--resume: there is no checkpoint in {out}")
    if launch.RANK == 0 and checkpoint.newest(out):
        set_aside(out)
    dist.barrier()
    torch.manual_seed(hash((job.seed, 0, launch.RANK)))  # the weights were drawn alike; noise in gates is each rank's
    return 0, Log()


def random_state(device: torch.device) -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else state


def set_aside(out: Path) -> None:
    """Keep what an earlier run left in `out` under another name."""
    free = next(path for n in itertools.count(1) if not (path := out.with_name(f"{out.name}.{n}")).exists())
    out.rename(free)
    say(f"{out} held another run, now {free}; --resume would have gone on with it")


def cross_entropy(model: GPT, tokens: Tensor) -> Tensor:
    """Mean nats per byte of tokens [B, S + 1]."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: GPT, text: Tensor, job: Job, device: torch.device, mine: dict[str, int]) -> float:
    """Bits per held-out byte; all ranks read their part, in as many batches."""
    model.eval()
    tokens = corpus.held_out(text, job.eval_size, job.seq, **mine).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=job.bf16):
        nats = torch.stack([cross_entropy(model, part) * part.shape[0] for part in tokens.split(16)]).sum()
    dist.all_reduce(nats)
    return float(nats) / job.eval_size / math.log(2)


@torch.no_grad()
def gather(model: GPT, loss: Tensor) -> tuple[float, list[list[int]], float]:
    """Over all ranks: mean loss, tokens per expert of each layer, share dropped; in one all-reduce."""
    stats = [m.stats for m in model.modules() if isinstance(m, MoE)]
    counts = [s.tokens_per_expert.double() for s in stats]
    dropped = torch.stack([s.dropped.double() for s in stats]).mean() if stats else torch.zeros_like(loss).double()
    flat = torch.cat([loss.double().reshape(1), dropped.reshape(1), *counts])
    dist.all_reduce(flat)
    mean, drop, *rest = flat.tolist()
    width = len(counts[0]) if counts else 1
    table = [[int(n) for n in rest[i : i + width]] for i in range(0, len(rest), width)]
    return mean / dist.get_world_size(), table, drop / dist.get_world_size()


def parse(argv: list[str] | None = None) -> Job:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Job):
        flag = "--" + f.name.replace("_", "-")
        if isinstance(f.default, bool):
            parser.add_argument(flag, action="store_true")
        elif isinstance(f.default, tuple):
            parser.add_argument(flag, nargs="+", default=())
        else:
            parser.add_argument(flag, type=type(f.default), default=f.default, help=f"default: {f.default}")
    values = vars(parser.parse_args(argv))
    return Job(**{**values, "data": tuple(values["data"])})


def main() -> int:
    job = parse()
    logging.basicConfig(format="%(message)s")
    try:
        ep = job.check(launch.RANKS)
        text = corpus.read(corpus.text_files(job.data) if job.data else corpus.standard_library(), job.seq)
        with launch.process_group() as device:
            return train(job, ep, text, device)
    except (ValueError, checkpoint.CheckpointError) as error:
        say(str(error), every_rank=True)
        return 2
    except RuntimeError:
        if launch.RANKS > 1:
            say(
                "ends here. If a connection was lost or timed out, another rank ended first: see its message. "
                "--resume goes on from the newest checkpoint; torchrun --max-restarts does so by itself.",
                True,
            )
        raise


if __name__ == "__main__":
    sys.exit(main())
