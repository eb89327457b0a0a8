"""Train a byte-level GPT with mixture-of-experts blocks, on one rank or on meshes of any shape.

    torchrun --standalone --nproc-per-node 4 examples/pretrain.py --steps 300
    torchrun --standalone --nproc-per-node 8 examples/pretrain.py --pp 2 --tp 2 --ep 4 --micro-batches 4
    torchrun --standalone --nproc-per-node 8 examples/pretrain.py --config examples/configs/one_node.toml
    python examples/pretrain.py --dense          # one rank, and the dense twin of equal FLOPs per token

The text is the source of the running Python's standard library, or --data. The batches, and so the losses,
do not depend on the mesh.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import corpus
import launch
import options
import steps
import torch
import torch.distributed as dist
from launch import say
from meter import Meter
from options import Job
from report import Log, draw, tensorboard
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm
from turnout.dispatch import Meshes
from turnout.models import ParallelModel, checkpoint
from turnout.models.checkpoint import AsyncCheckpointer
from turnout.moe import GradScaler

# exit statuses: an error while training, flags or files that do not fit, and what a shell calls ended by SIGTERM
FAILED, REFUSED, STOPPED = 1, 2, 143


def train(job: Job, text: tuple[Tensor, Tensor], device: torch.device, place: launch.Place) -> int:
    """The exit status: 0, or STOPPED after SIGTERM; `place` tells where it is."""
    with AsyncCheckpointer(job.out, job.keep, job.timeout) as checkpointer:
        return train_steps(job, text, device, place, checkpointer)


def train_steps(
    job: Job,
    text: tuple[Tensor, Tensor],
    device: torch.device,
    place: launch.Place,
    checkpointer: AsyncCheckpointer,
) -> int:
    out, stop = Path(job.out), launch.Stop()
    per_node = launch.RANKS_PER_NODE if launch.NODES > 1 else None
    meshes = Meshes.of(
        device.type, pp=job.pp, tp=job.tp, ep=job.ep, etp=job.etp, ranks_per_node=per_node, timeout=job.timeout
    )
    model = steps.build(job, meshes)
    optimizer = steps.adamw(model, job.lr)
    scaler = GradScaler(device.type, enabled=job.fp16)
    first, log = begin(job, model, optimizer, scaler)
    meter = Meter(job.config(), meshes, job.batch * job.seq, job.peak_tflops, device)
    board = tensorboard(out, first) if job.tensorboard and launch.RANK == 0 else None
    skips = steps.Skips(job.on_nonfinite, job.max_skipped, total=log.skips)

    say(header(job, meter, text, device, first))
    stopping, silent = False, launch.RANK != 0 or not sys.stderr.isatty()
    bar = tqdm(total=job.steps, initial=first, disable=silent, file=sys.stderr)
    for done in range(first + 1, job.steps + 1):
        logged = done % job.log_every == 0 or done == job.steps
        place.at("training", done)
        stop.ask()
        lr = job.lr_at(done - 1)
        with meter.step(count=logged):
            tokens = steps.batch(job, text[0], done - 1, meshes)
            step = steps.train(model, optimizer, scaler, tokens, lr)
        skips.add(done, step)
        stopping = stop.answer() and done < job.steps

        last = stopping or done == job.steps
        log.take(step.loss, skips.total)
        if logged:
            place.at("the log")
            log.add(done, meter.read(), *steps.gather(model))
            if launch.RANK == 0:
                with open(out / "log.jsonl", "a") as lines:
                    print(json.dumps(log.entry(lr=lr, gradient_norm=step.norm)), file=lines)
            bar.set_postfix_str(log.summary())
            if silent:
                say(f"step {done} of {job.steps}: {log.summary()}")
            if board:
                board.step(log, model, {"lr": lr, "gradient norm": step.norm})
        bar.update()
        if done % job.eval_every == 0 or done == job.steps:
            place.at("the evaluation")
            log.add_held_out(done, steps.evaluate(model, text[1], job))
            if board:
                board.held_out(log)
        unless_disk_fails(checkpointer.poll)
        if done % job.save_every == 0 or last:
            place.at("the checkpoint")
            unless_disk_fails(checkpointer.wait)
            extra = {"log": asdict(log), "job": asdict(job), "scaler": scaler.state_dict()}
            checkpointer.save(model.parts, optimizer, done, extra, random_state(device))
            if last:
                checkpointer.wait()
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
        print(json.dumps(figures(job, log, meter)), flush=True)
    return 0


def begin(job: Job, model: ParallelModel, optimizer: Optimizer, scaler: GradScaler) -> tuple[int, Log]:
    """The first step, and the curves so far: of the newest checkpoint where the job goes on with one."""
    out = Path(job.out)
    again = launch.restarted()
    loaded = checkpoint.load_newest(out, model.parts, optimizer) if job.resume or again else None
    if loaded:
        if loaded.rank_state:
            torch.set_rng_state(loaded.rank_state["cpu"])
            if "cuda" in loaded.rank_state:
                torch.cuda.set_rng_state(loaded.rank_state["cuda"])
        else:
            torch.manual_seed(hash((job.seed, loaded.step, launch.RANK)))
            say("another number of ranks: the random numbers of gates start anew")
        if job.fp16 and loaded.extra.get("scaler"):
            scaler.load_state_dict(loaded.extra["scaler"])
        say(f"going on after step {loaded.step}")
        return loaded.step, Log(**loaded.extra["log"])
    if job.resume and not again:
        raise ValueError(f"--resume: there is no checkpoint in {out}")
    if launch.RANK == 0:
        if checkpoint.newest(out):
            set_aside(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.jsonl").unlink(missing_ok=True)  # of a run that ended before its first checkpoint
    dist.barrier()
    torch.manual_seed(hash((job.seed, 0, launch.RANK)))  # the weights were drawn alike; noise in gates is each rank's
    return 0, Log()


def unless_disk_fails(call: Callable[[], checkpoint.Saved | None]) -> checkpoint.Saved | None:
    """What `poll` or `wait` returns. That the disk is full, or fails, is said; it does not end the job."""
    try:
        return call()
    except checkpoint.WriteError as error:
        say(f"a checkpoint is not written, and training goes on to the next one (--save-every): {error}")
        return None


def random_state(device: torch.device) -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else state


def set_aside(out: Path) -> None:
    """Keep what an earlier run left in `out` under another name."""
    free = unused(out.with_name(f"{out.name}.{n}") for n in itertools.count(1))
    try:
        out.rename(free)
    except OSError:  # a mount point has to stay, or the folder above is not ours: go down instead
        free = unused(out / f"run.{n}" for n in itertools.count(1))
        held = [path for path in out.iterdir() if not path.match("run.*") and path.name != "lost+found"]
        free.mkdir()
        for path in held:
            path.rename(free / path.name)
    say(f"{out} held another run, now {free}; --resume would have gone on with it")


def unused(paths: Iterable[Path]) -> Path:
    return next(path for path in paths if not path.exists())


def header(job: Job, meter: Meter, text: tuple[Tensor, Tensor], device: torch.device, first: int) -> str:
    """What the job is about to do, in a line."""
    kind = "dense" if job.dense else f"{job.experts} experts, top {job.top_k}"
    axes = {"pp": job.pp, "dp": launch.RANKS // job.pp // job.tp, "tp": job.tp, "ep": job.ep, "etp": job.etp}
    return "; ".join(
        [
            f"GPT of {job.layers} blocks ({kind}), {meter.parameters:,} parameters, {meter.active_parameters:,} active",
            f"{len(text[0]):,} bytes of text and {len(text[1]):,} held out",
            f"{device.type}, ranks {launch.RANKS}: {', '.join(f'{axis} {size}' for axis, size in axes.items())}",
            f"steps {first + 1} to {job.steps}",
        ]
    )


def figures(job: Job, log: Log, meter: Meter) -> dict[str, Any]:
    """What the job came to, for its last line of output."""
    return {
        "steps": job.steps,
        "loss": log.loss[-1],
        "val_bpb": log.val_bpb[-1],
        **log.usage[-1],
        **meter.rates(),
        "seconds": round(meter.seconds, 1),
        "dropped": log.dropped[-1],
        "imbalance": log.imbalance[-1],
        "ranks": dist.get_world_size(),
        "mesh": {"pp": job.pp, "tp": job.tp, "ep": job.ep, "etp": job.etp},
        "parameters": meter.parameters,
        "active_parameters": meter.active_parameters,
    }


def main() -> int:
    logging.basicConfig(format="%(message)s")
    try:
        with redirect_stdout(None) if launch.RANK else nullcontext():  # --help once
            job = options.parse(about=__doc__).fit(launch.RANKS)
        text = corpus.read(corpus.text_files(job.data) if job.data else corpus.standard_library(), job.seq)
    except ValueError as error:
        launch.once(str(error))
        return REFUSED
    place = launch.Place()
    with launch.process_group(timedelta(seconds=job.timeout)) as device:
        try:
            return train(job, text, device, place)
        except (ValueError, checkpoint.CheckpointError) as error:
            launch.once(f"{place}: {error}" if place.step else str(error))
            return FAILED if place.step else REFUSED
        except steps.NonFiniteError as error:
            launch.once(str(error))
            return FAILED
        except RuntimeError:
            if launch.RANKS > 1:
                say(
                    f"{place.failed()}. If a connection was lost or timed out, look at the rank that ended first or "
                    "gave no word. --resume goes on from the newest checkpoint; torchrun --max-restarts does so by "
                    "itself.",
                    every_rank=True,
                )
            raise


if __name__ == "__main__":
    sys.exit(main())
