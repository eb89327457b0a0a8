"""Train a GPT, BERT or T5 with MoE layers, on any mesh of data, context, tensor, pipeline and expert ranks.

    torchrun --standalone --nproc-per-node 4 examples/pretrain.py --steps 300
    torchrun --standalone --nproc-per-node 8 examples/pretrain.py --pp 2 --tp 2 --ep 4 --micro-batches 4
    torchrun --standalone --nproc-per-node 8 examples/pretrain.py --config examples/configs/one_node.toml
    python examples/pretrain.py --config examples/configs/cluster.toml --plan --ranks 512 --cluster h100
    python examples/pretrain.py --dense          # one rank, and a dense model of equal FLOPs per token

The text is the source of Python's standard library, or --data: files, or folders that turnout.models.data has prepared.
Batches do not depend on the mesh, so the losses do not either.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import launch
import objective
import options
import planned
import sources
import steps
import torch
from board import tensorboard
from launch import say
from log import Log, Recent, mean, summary
from meter import Meter
from options import Job
from ownership import Run
from profiling import profiled
from specialisation import BytesOfExperts
from spikes import Spikes
from torch.optim import Optimizer
from turnout.dispatch import Meshes
from turnout.models import EMA, ParallelModel, checkpoint, report
from turnout.models.checkpoint import AsyncCheckpointer, Saved, WriteError
from turnout.models.data import Prefetcher
from turnout.moe import Adaptive, GradScaler, ReplicaError, check_replicas
from watch import Watch

try:
    from tqdm import tqdm
except ModuleNotFoundError as error:
    launch.missing(error, "train")

# exit statuses: an error in training, wrong flags or files, and the shell's status for SIGTERM
FAILED, REFUSED, STOPPED = 1, 2, 143


def train(job: Job, device: torch.device, place: launch.Place) -> int:
    """Train the job, and return the exit status: 0, or STOPPED after SIGTERM. `place` follows the current step."""
    out, stop, run = Path(job.out), launch.Stop(), Run.claim(job)
    data = sources.Data.open(job)
    run = replace(run, text=data.fingerprint)
    if launch.RANK == 0:
        data.keep_tokenizer(out)
    per_node = launch.RANKS_PER_NODE if launch.NODES > 1 else None
    sizes = {"pp": job.pp, "cp": job.cp, "tp": job.tp, "ep": job.ep, "etp": job.etp}
    meshes = Meshes.of(device.type, **sizes, ranks_per_node=per_node, timeout=job.timeout)
    batches = objective.Asked(job, data.batches(job, meshes))
    held_out = data.held_out(job, meshes)
    model = steps.build(job, meshes)
    optimizer = steps.optimizer_of(model, job)
    scaler = GradScaler(device.type, enabled=job.fp16)
    ema = steps.average_of(model, job)
    first, recent = begin(job, run, model, ema, optimizer, scaler)
    meter = Meter(job.config(), meshes, job.batch * job.seq, job.peak_tflops, device)
    board = tensorboard(out, first) if job.tensorboard and launch.RANK == 0 else None
    skips, spikes = steps.Skips(job.on_nonfinite, job.max_skipped, total=recent.skipped), Spikes()
    adaptive = None
    if (job.adapt or job.place or job.watch) and not job.dense:
        adaptive = Adaptive(model, meshes, optimizer if job.place else None, every=job.log_every)
        logging.getLogger("turnout").setLevel(logging.INFO)  # it says what it changes
    watch = Watch(meshes) if job.watch and adaptive else None
    silent, stopping, done = launch.RANK != 0 or not sys.stderr.isatty() or job.watch, False, first

    with (
        Log(out / "log.jsonl", place) as log,
        AsyncCheckpointer(out, job.keep, job.timeout) as checkpointer,
        profiled(job.profile, out / "profile") as profiler_step,
        Prefetcher(batches, job.steps) as batch,
        tqdm(total=job.steps, initial=first, disable=silent, file=sys.stderr) as bar,
    ):
        known = described(job, run, meter, data, device)
        start = log.write("start", first, **known, bytes_per_token=batches.rows.bytes_per_token)
        say(header(start))
        if job.forced_balance:
            say("--forced-balance: tokens go to experts in turn. This run measures speed, and its losses mean nothing")

        def evaluate() -> None:
            place.at("the evaluation")
            with BytesOfExperts(model) if batches.of_bytes else nullcontext() as experts:
                found = steps.held_out_figures(model, held_out, job, ema)
            event = log.write("held out", done, **found, bytes=experts.most() if experts else None)
            if board:
                board.held_out(event)

        if not first:
            evaluate()  # what fails in an evaluation fails before the first step
        for done in range(first + 1, job.steps + 1):
            place.at("training", done)
            stop.ask()
            logged, lr = done % job.log_every == 0 or done == job.steps, job.lr_at(done - 1)
            with meter.step(count=logged):
                tokens = batch(done - 1).to(device)
                step = steps.train(model, optimizer, scaler, tokens, lr, spikes=spikes)
                if adaptive:
                    adaptive.step()
            if ema and not step.nonfinite:
                ema.update()
            profiler_step()
            skips.add(done, step)
            recent.take(step.loss, skips.total)
            if spike := step.spike:
                say(f"step {done}: {spike}")
                where = {"parameter": spike.parameter, "rank": spike.rank}
                log.write("spike", done, loss=spike.loss, median=spike.usual, **where)
            stopping = stop.answer() and done < job.steps
            last = stopping or done == job.steps
            saves = done % job.save_every == 0 or last

            if logged or saves:
                place.at("the log")
                recent.count(*steps.gather(model))
            if logged:
                event = log.write("step", done, lr=lr, gradient_norm=step.norm, **meter.read(), **recent.spend())
                bar.set_postfix_str(summary(event))
                if watch and adaptive:
                    watch.show(f"step {done} of {job.steps}: {summary(event)}", adaptive.reports)
                elif silent:
                    say(f"step {done} of {job.steps}: {summary(event)}")
                if board:
                    board.step(event, model)
            bar.update()
            if done % job.eval_every == 0 or done == job.steps:
                evaluate()
            log_saved(log, checkpointer.poll)
            if saves or done % job.check_every == 0:
                place.at("the comparison of replicas")
                check_replicas(model.parts)
            if saves:
                place.at("the checkpoint")
                log_saved(log, checkpointer.wait)
                extra = {"recent": asdict(recent), "scaler": scaler.state_dict(), **run.signature()}
                checkpointer.save(steps.saved(model, ema), optimizer, done, extra, random_state(device))
            if last:
                log_saved(log, checkpointer.wait, final=True)
            if stopping:
                break
        log.write("end", done, reason="stopped by SIGTERM" if stopping else "done")
    if board:
        board.close()
    if stopping:
        say(f"stopped by SIGTERM after step {done}; it is saved, and --resume continues from there")
        return STOPPED
    if launch.RANK == 0:
        say(f"report: {reported(out)}; log: {log.path}")
        print(json.dumps(figures(job, log, meter)), flush=True)
    return 0


def log_saved(log: Log, call: Callable[[], Saved | None], final: bool = False) -> None:
    """Log the checkpoint that `poll` or `wait` returns. If the disk is full or failing, only the `final` one raises."""
    try:
        saved = call()
    except WriteError as error:
        if final:
            raise
        say(f"a checkpoint is not written, and training continues until the next one (--save-every): {error}")
    else:
        if saved:
            log.write("checkpoint", saved.step, stall_s=saved.stalled, seconds=saved.seconds)


def reported(out: Path) -> Path | str:
    """Write the report, and return its path, or the reason why there is none: the job itself must not fail for that."""
    try:
        return report.write(out)
    except (report.LogError, ModuleNotFoundError, OSError) as error:
        return f"none, {error}"


def begin(
    job: Job, run: Run, model: ParallelModel, ema: EMA | None, optimizer: Optimizer, scaler: GradScaler
) -> tuple[int, Recent]:
    """Load the newest checkpoint if the job resumes, and return the steps done and values that are not logged yet."""
    parts = steps.saved(model, ema)
    loaded = checkpoint.load_newest(job.out, parts, optimizer, run.accept) if run.resumes else None
    if loaded is None:
        # all ranks have drawn the same weights; from here on each has its own seed, for noise in gates
        torch.manual_seed(hash((job.seed, 0, launch.RANK)))
        return 0, Recent()
    if loaded.rank_state:
        torch.set_rng_state(loaded.rank_state["cpu"])
        if "cuda" in loaded.rank_state:
            torch.cuda.set_rng_state(loaded.rank_state["cuda"])
    else:
        torch.manual_seed(hash((job.seed, loaded.step, launch.RANK)))
        say("the number of ranks has changed: noise in gates starts with new seeds")
    if job.fp16 and loaded.extra.get("scaler"):
        scaler.load_state_dict(loaded.extra["scaler"])
    say(f"resuming after step {loaded.step} of run {run.id}")
    return loaded.step, Recent(**loaded.extra.get("recent", {}))


def random_state(device: torch.device) -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else state


def described(job: Job, run: Run, meter: Meter, data: sources.Data, device: torch.device) -> dict[str, Any]:
    """Values of the start event in the log."""
    return {
        "run": run.id,
        "restart": run.restarted,
        "job": asdict(job),
        "mesh": mesh(job, launch.RANKS // (job.pp * job.cp * job.tp)),
        "ranks": launch.RANKS,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "parameters": meter.parameters,
        "active_parameters": meter.active_parameters,
        **data.facts(),
    }


def mesh(job: Job, dp: int | None = None) -> dict[str, int]:
    """Sizes of the axes; cp only if it splits sequences."""
    sizes = {"pp": job.pp, "dp": dp, "cp": job.cp if job.cp > 1 else None, "tp": job.tp, "ep": job.ep, "etp": job.etp}
    return {axis: size for axis, size in sizes.items() if size is not None}


def header(start: dict[str, Any]) -> str:
    """One line of text for the start event."""
    job = start["job"]
    shared = f", {job['shared']} shared" if job["shared"] else ""
    kind = "dense" if job["dense"] else f"{job['experts']} experts, top {job['top_k']}{shared}"
    sizes = f"{start['parameters']:,} parameters, {start['active_parameters']:,} active"
    axes = ", ".join(f"{axis} {size}" for axis, size in start["mesh"].items())
    return "; ".join(
        [
            f"{objective.described(job)} ({kind}), {sizes}",
            f"{start['train_bytes']:,} bytes of text and {start['held_out_bytes']:,} held out",
            f"{start['device']}, ranks {start['ranks']}: {axes}",
            f"steps {start['step'] + 1} to {job['steps']}",
        ]
    )


def figures(job: Job, log: Log, meter: Meter) -> dict[str, Any]:
    """Results of the job, for its last line of output."""
    step, held_out = (log.last.get(kind, {}) for kind in ("step", "held out"))  # missing if there was no step to do
    return {
        "steps": job.steps,
        "loss": step.get("loss"),
        **objective.figures(held_out),
        "memory_bytes": step.get("memory_bytes"),
        "sent_bytes": step.get("sent_bytes"),
        **meter.rates(),
        "seconds": round(meter.seconds, 1),
        "dropped": mean(step.get("dropped", [])),
        "imbalance": max(step.get("imbalance", []), default=1.0),
        "ranks": launch.RANKS,
        "mesh": mesh(job),
        "parameters": meter.parameters,
        "active_parameters": meter.active_parameters,
    }


def main() -> int:
    logging.basicConfig(format="%(message)s")
    try:
        job = options.parse(about=__doc__)
        job = sources.with_vocabulary(job)
        if job.elastic:
            job = planned.elastic(job, launch.RANKS, launch.RANKS_PER_NODE)
        job = job.fit(ranks := job.ranks or launch.RANKS)
        if job.plan:
            if launch.RANK == 0:
                print(planned.plan(job, ranks, sources.tokens_of(job)))
            return 0
    except ValueError as error:
        launch.once(str(error))
        return REFUSED
    launch.end_with_launcher()
    place = launch.Place()
    with launch.process_group(timedelta(seconds=job.timeout)) as device:
        try:
            return train(job, device, place)
        except (ValueError, checkpoint.CheckpointError) as error:
            launch.once(f"{place}: {error}" if place.step else str(error))
            return FAILED if place.step else REFUSED
        except steps.NonFiniteError as error:
            launch.once(f"{error}. --resume continues from the newest checkpoint")
            return FAILED
        except ReplicaError as error:
            launch.once(f"step {place.step}: {error}")
            return FAILED
        except RuntimeError:
            if launch.RANKS > 1:
                record = launch.flight_record(Path(job.out))
                written = f" Its last collectives are in {record}." if record else ""
                say(
                    f"{place.failed()}. If a connection was lost or timed out, look at the rank that ended first or "
                    f"did not answer.{written} --resume continues from the newest checkpoint; torchrun --max-restarts "
                    "does so by itself.",
                    every_rank=True,
                )
            raise


if __name__ == "__main__":
    sys.exit(main())
