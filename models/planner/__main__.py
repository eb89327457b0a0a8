"""Choose the layout of a job: python -m turnout.models.planner --cluster h100 --gpus 512 --batch 1024 ..."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from ...dispatch.autoselect.profile import Profile
from ..pipeline.partition import PER_RANK
from . import tables
from .architecture import Architecture
from .breakdown import Estimate
from .chart import draw_steps, draw_timeline
from .cluster import Cluster, presets
from .job_file import JobFile, start_commands, toml
from .layout import DTYPES, RECOMPUTE, ZERO
from .search import Found, search
from .timeline import replay
from .update import ADAMW, OPTIMIZERS, Update

AXES = {
    "pp": "pipeline stages",
    "tp": "ranks that split each layer",
    "cp": "ranks that split each sequence (default: 1)",
    "dp": "ranks that have parts of the batch",
    "ep": "ranks that share the experts",
    "etp": "ranks that split each expert",
    "micro_batch": "sequences that a rank takes at a time",
    "virtual": "stages on each rank of the pipeline",
}
SIZES = {
    "layers": "blocks",
    "dim": "model width",
    "heads": "attention heads",
    "kv_heads": "heads of keys and values (default: --heads)",
    "ffn": "width of a dense feed-forward network (default: 4 x dim; beside experts (top-k + shared) x hidden)",
    "vocab": "tokens in the vocabulary (default: 51200)",
    "seq": "tokens in a sequence (default: 2048)",
    "experts": "experts of a mixture; 0 is a dense GPT (default: 0)",
    "top_k": "experts that a token picks (default: 2)",
    "hidden": "width of an expert (default: 4 x dim)",
    "moe_every": "every n-th block is a mixture (default: 2)",
    "shared": "experts that every token visits (default: 0)",
}


class Parser(argparse.ArgumentParser):
    """Parser that raises ValueError, so that all errors are printed in the same way."""

    def error(self, message: str) -> NoReturn:
        """Raise the error of a wrong command line."""
        raise ValueError(f"{message}; --help lists all flags")


def parser() -> Parser:
    """Parser with all flags."""
    made = Parser(prog="python -m turnout.models.planner", description=__doc__, allow_abbrev=False)
    made.add_argument("--cluster", required=True, help=f"{', '.join(presets())}, or a TOML file like theirs")
    made.add_argument("--gpus", type=int, required=True, help="number of ranks")
    made.add_argument("--batch", type=int, help="number of sequences in a step, on all ranks together")
    model = made.add_argument_group("the model")
    model.add_argument("--config", help="TOML file of examples/pretrain.py; its model, batch and dtype count")
    for name, about in SIZES.items():
        model.add_argument(flag(name), type=int, help=about)
    model.add_argument("--activation", choices=("gelu", "swiglu"), help="(default: gelu, with experts swiglu)")
    model.add_argument(
        "--imbalance", type=float, default=1.0, help="load of the busiest rank over the mean (default: 1)"
    )
    model.add_argument("--capacity", type=float, help="capacity factor, padded; 0 (default): dropless")
    layout = made.add_argument_group("the layout: what is not given is searched")
    for name, about in AXES.items():
        layout.add_argument(flag(name), type=int, help=about)
    layout.add_argument("--schedule", choices=tuple(PER_RANK))
    layout.add_argument("--recompute", choices=RECOMPUTE)
    layout.add_argument("--zero", choices=("0", "1", "2", "3", *ZERO), help="stage of ZeRO, or its name in the job")
    layout.add_argument("--dtype", choices=DTYPES, help="(default: bf16, or that of --config)")
    made.add_argument("--optimizer", choices=OPTIMIZERS, help="(default: adamw, or that of --config)")
    made.add_argument("--ema", action="store_true", help="keep an average of the weights")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another constant of the cluster")
    made.add_argument("--profile", help="links and products as turnout.dispatch.autoselect.probe measured them")
    made.add_argument("--json", action="store_true", help="print one object, or with --top a list")
    made.add_argument("--top", type=int, help="number of layouts to print (default: 10; with --json one)")
    made.add_argument("--png", help="draw where the time of a step goes")
    made.add_argument("--timeline", help="replay the best layout's schedule and draw it")
    made.add_argument("--save", help="write the best layout to this file, for examples/pretrain.py --config")
    return made


def flag(name: str) -> str:
    """The flag of a name, as on the command line."""
    return "--" + name.replace("_", "-")


def architecture(given: argparse.Namespace) -> Architecture:
    """The model that the flags describe. Sizes that they leave out come from `--config`."""
    sizes = {name: getattr(given, name) for name in SIZES if getattr(given, name) is not None}
    if given.config:
        model = _changed(JobFile.read(given.config).model, sizes, given.activation)
    else:
        if missing := [flag(name) for name in ("layers", "dim", "heads") if name not in sizes]:
            raise ValueError(f"{', '.join(missing)}: give the model's sizes, or --config FILE.toml")
        model = _of_sizes(sizes, given.activation)
    if given.capacity is not None:
        model = replace(model, capacity=given.capacity)
    if not model.experts and (given.capacity or given.imbalance != 1):
        raise ValueError("--capacity and --imbalance describe experts; give --experts as well")
    return model.with_load(given.imbalance)


def _changed(model: Architecture, sizes: dict[str, int], activation: str | None) -> Architecture:
    """The model of a job with other sizes. A dense block of a job is as wide as the experts of a token."""
    before = model
    gated = model.gated if activation is None else activation == "swiglu"
    model = replace(model, **sizes, gated=gated)
    if "ffn" not in sizes and before.experts:
        model = replace(model, ffn=model.visited)
    return model


def _of_sizes(sizes: dict[str, int], activation: str | None) -> Architecture:
    base: dict[str, Any] = {"vocab": 51200, "seq": 2048, "kv_heads": sizes["heads"], "experts": 0} | sizes
    if not base["experts"]:
        if unused := sorted({"top_k", "hidden", "moe_every", "shared"} & sizes.keys()):
            raise ValueError(f"{', '.join(map(flag, unused))} describe experts; give --experts as well")
        plain = activation != "swiglu"
        base.setdefault("ffn", 4 * base["dim"])
        return Architecture(**base, gated=not plain, plain=plain)
    base = {"top_k": 2, "moe_every": 2, "hidden": 4 * base["dim"]} | base
    base.setdefault("ffn", base["top_k"] * base["hidden"])
    return Architecture(**base, gated=activation != "gelu")


def fixed(given: argparse.Namespace) -> dict[str, Any]:
    """Fields of a `Layout` that the flags give."""
    named = {name: getattr(given, name) for name in (*AXES, "schedule", "recompute", "zero")}
    named = {name: value for name, value in named.items() if value is not None}
    if "zero" in named:
        named["zero"] = ZERO.index(named["zero"]) if named["zero"] in ZERO else int(named["zero"])
    return named


def main(argv: list[str] | None = None) -> int:
    """Plan, print, and return the exit status: 0, or 2 for wrong flags or files, or if no layout fits."""
    try:
        given = parser().parse_args(argv)
        cluster = Cluster.load(given.cluster).changed(given.set)
        if given.profile:
            cluster = cluster.with_links(Profile.load(given.profile))
        model, batch, dtype = architecture(given), given.batch, given.dtype or "bf16"
        update = ADAMW
        if given.config:
            job = JobFile.read(given.config)
            batch, dtype, update = batch or job.batch, given.dtype or job.dtype, job.update
            if job.layout:
                print(f"{given.config}: its {', '.join(job.layout)} are left aside; flags fix them", file=sys.stderr)
        if batch is None:
            raise ValueError("--batch: how many sequences does a step have, on all ranks together?")
        update = Update(given.optimizer or update.optimizer, given.ema or update.ema)
        chosen = fixed(given)
        found = search(model, cluster, given.gpus, batch, chosen, dtype, update)
        top = given.top if given.top is not None else 1 if given.json else 10
        if top < 1:
            raise ValueError(f"--top must be positive; got {top}")
        best = found.plans[:top]
        for warning in tables.warnings(model, cluster, best[0]):
            print(f"warning: {warning}", file=sys.stderr)
        if given.json:
            objects = [plan.to_json() for plan in best]
            print(json.dumps(objects if given.top is not None else objects[0]))
        else:
            print(page(model, cluster, batch, found, top, chosen, dtype, given.save or "plan.toml", update))
        if given.save:
            Path(given.save).write_text(toml(model, best[0].layout, batch, update))
        draw(given, model, cluster, best)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def page(
    model: Architecture,
    cluster: Cluster,
    batch: int,
    found: Found,
    top: int,
    chosen: dict[str, Any],
    dtype: str,
    save: str,
    update: Update = ADAMW,
) -> str:
    """All that is printed without --json."""
    best = found.plans[0]
    leaves = None
    if "tp" not in chosen:  # the search keeps tp in a node: what would it be beyond?
        try:
            wider = chosen | {"tp": 2 * cluster.ranks_per_node}
            leaves = search(model, cluster, best.layout.ranks, batch, wider, dtype, update).plans[0]
        except ValueError:
            pass
    parts = [
        tables.describe(model, cluster, batch),
        f"the best of {len(found.plans)} layouts that fit, of {found.tried} tried:",
        tables.table(found.plans[:top]),
        "why others lost:\n" + "\n".join(f"- {line}" for line in tables.lost(found, cluster, leaves)),
        tables.time_table(best),
        "\n\n".join([tables.memory_table(best, cluster), *tables.segments(model, cluster, best)]),
        f"{save}, for examples/pretrain.py:\n\n{toml(model, best.layout, batch, update)}\nstart it with\n"
        + "\n".join(f"  {line}" for line in start_commands(best.layout, cluster.ranks_per_node, save)),
        *tables.node_order(best),
    ]
    return "\n\n".join(parts)


def draw(given: argparse.Namespace, model: Architecture, cluster: Cluster, best: list[Estimate]) -> None:
    """Draw the pictures that the flags ask for. Without matplotlib, print a message."""
    try:
        if given.png:
            draw_steps(best, given.png)
        if given.timeline:
            simulation = replay(model, cluster, best[0])
            draw_timeline(simulation, given.timeline, best[0].layout.schedule)
    except ModuleNotFoundError as error:
        print(f"no picture: {error}; pip install 'turnout[train]' brings matplotlib", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
