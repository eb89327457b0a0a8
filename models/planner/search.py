"""Search: estimate all layouts of a number of ranks, and rank them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any

from ..pipeline.partition import PER_RANK
from .architecture import Architecture
from .breakdown import Estimate
from .cluster import Cluster
from .estimate import Estimator
from .layout import DTYPES, RECOMPUTE, Layout, misfit
from .placement import check_nodes, placements
from .update import ADAMW, Update

WORTH = 0.995  # of the time of a smaller micro-batch: what a larger one must be below, for the memory it takes
SLICES = (1, 2, 4, 8)  # of an expert; more make its products too small


@dataclass
class Found:
    """Result of a search: the layouts that fit, and why others do not.

    Attributes:
        plans: estimates of layouts that fit into memory, the fastest first.
        tried: number of layouts that were tried.
        too_large: the layout that needs least memory among those that do not fit.
        does_not_fit: number of layouts that do not fit into memory.
        refused: number of layouts that cannot run, by the reason.
    """

    plans: list[Estimate] = field(default_factory=list)
    tried: int = 0
    too_large: Estimate | None = None
    does_not_fit: int = 0
    refused: Counter[str] = field(default_factory=Counter)


def search(
    model: Architecture,
    cluster: Cluster,
    gpus: int,
    batch: int,
    fixed: Mapping[str, Any] | None = None,
    dtype: str = "bf16",
    update: Update = ADAMW,
) -> Found:
    """Estimate all layouts of a model on a cluster, and rank them.

    Args:
        model: sizes of the model.
        cluster: the cluster.
        gpus: number of ranks.
        batch: number of sequences in a step, on all ranks together.
        fixed: fields of `Layout` that are given, by name. Others are searched, but cp stays 1 and tp in a node. None by
            default.
        dtype: dtype in which the model computes: "bf16" (the default), "fp16" or "fp32".
        update: optimizer, and whether the job keeps an average of the weights; AdamW without one by default.

    Raises:
        ValueError: no layout runs, or none fits into memory. The message says what to change.
    """
    fixed = dict(fixed or {})
    _check_names(fixed, dtype)
    _check(fixed, gpus, batch)
    check_nodes(cluster, gpus)
    found = Found()
    estimators = [Estimator(model, cluster, batch, placement, update) for placement in placements(cluster)]
    for family in _families(model, cluster, gpus, batch, fixed, found):
        fastest = inf
        for micro_batch in _micro_batches(batch // family["dp"], cluster, fixed):
            known = len(found.plans)
            if not _estimate(estimators, found, family | {"micro_batch": micro_batch, "dtype": dtype}, fixed):
                break  # larger micro-batches need more still
            for plan in found.plans[known:]:
                if WORTH * fastest < plan.seconds < fastest:
                    found.plans.pop()
                else:
                    fastest = min(fastest, plan.seconds)
    if not found.plans:
        raise ValueError(_nothing(found, cluster, gpus))
    found.plans.sort(key=lambda plan: plan.seconds)
    return found


def _estimate(estimators: list[Estimator], found: Found, given: dict[str, Any], fixed: Mapping[str, Any]) -> bool:
    """Estimate a layout with the least recomputation that fits, on its best nodes. False if nothing fits."""
    estimator = estimators[0]
    given["micro_batches"] = estimator.batch // (given["dp"] * given["micro_batch"])
    if given["schedule"] == "gpipe" and "schedule" not in fixed and given["micro_batches"] >= given["pp"] > 1:
        return True  # 1f1b takes as long and holds less
    modes = [fixed["recompute"]] if "recompute" in fixed else estimator.cluster.software.recompute
    for recompute in sorted(modes, key=RECOMPUTE.index):
        layout = Layout(**given, recompute=recompute)
        found.tried += 1
        if reason := misfit(layout, estimator.model, estimator.batch):
            found.refused[reason] += 1
            return True
        held = estimator.memory(layout)
        if estimator.fits(held):
            found.plans.append(min((each(layout) for each in estimators), key=lambda plan: plan.seconds))
            return True
        found.does_not_fit += 1
        if found.too_large is None or held.total < found.too_large.memory.total:
            found.too_large = estimator(layout)
    return False


def _families(
    model: Architecture, cluster: Cluster, gpus: int, batch: int, fixed: Mapping[str, Any], found: Found
) -> Iterator[dict[str, Any]]:
    """Fields of all layouts, without micro-batch and recomputation."""

    def values(name: str, options: Any) -> list[Any]:
        return [fixed[name]] if name in fixed else list(options)

    cp = fixed.get("cp", 1)  # what each rank computes stays the same with more of them, and so it is not searched
    for pp in values("pp", [p for p in _divisors(gpus // cp) if p <= model.layers]):
        for tp in values("tp", [t for t in _divisors(gpus // cp // pp) if t <= cluster.ranks_per_node]):
            dp, rest = divmod(gpus, pp * tp * cp)
            if rest or dp != fixed.get("dp", dp):
                found.refused[f"--pp {pp} x --tp {tp} x --dp {fixed.get('dp', dp)} are not --gpus {gpus}"] += 1
                continue
            if batch % dp:
                found.refused[f"--batch ({batch}) must be a multiple of --dp ({dp})"] += 1
                continue
            stage = dp * cp * tp
            eps = [e for e in _divisors(stage) if model.experts % e == 0] if model.moe_blocks else [1]
            for ep in values("ep", eps):
                etps = [e for e in SLICES if stage % (ep * e) == 0 and e <= cluster.ranks_per_node] if ep > 1 else [1]
                for etp in values("etp", [e for e in etps if model.hidden % e == 0] or [1]):  # or `misfit` says why
                    axes = {"pp": pp, "tp": tp, "cp": cp, "dp": dp, "ep": ep, "etp": etp}
                    axes |= {name: fixed[name] for name in ("cp_attention",) if name in fixed}
                    for schedule, virtual in _schedules(model, cluster, pp, fixed):
                        # in a pipeline ZeRO 2 and 3 do as 1
                        stages = [z for z in cluster.software.zero if z < 2 or pp == 1] if dp * cp > 1 else [0]
                        for zero in values("zero", stages):
                            yield axes | {"schedule": schedule, "virtual": virtual, "zero": zero}


def _schedules(model: Architecture, cluster: Cluster, pp: int, fixed: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Schedules, with the stages on each rank. Uneven stages come only where even ones are impossible."""
    if pp == 1:
        yield fixed.get("schedule", "1f1b"), fixed.get("virtual", 1)
        return
    for schedule in [fixed["schedule"]] if "schedule" in fixed else cluster.software.schedules:
        least, most = PER_RANK[schedule]
        if "virtual" in fixed:
            if "schedule" in fixed or (least <= fixed["virtual"] <= (most or inf)):
                yield schedule, fixed["virtual"]
            continue
        even = [v for v in range(least, model.layers // pp + 1) if model.layers % (pp * v) == 0]
        uneven = [v for v in (least, 2 * least, 4 * least) if pp * v <= model.layers and (v == 1 or least > 1)]
        yield from ((schedule, v) for v in (even or uneven) if v <= (most or v))


def _micro_batches(sequences: int, cluster: Cluster, fixed: Mapping[str, Any]) -> list[int]:
    if "micro_batch" in fixed:
        return [fixed["micro_batch"]]
    return [size for size in sorted(cluster.software.micro_batches) if sequences % size == 0]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _check_names(fixed: Mapping[str, Any], dtype: str) -> None:
    names = {field.name for field in fields(Layout)} - {"micro_batches", "dtype"}
    if unknown := sorted(fixed.keys() - names):
        raise ValueError(f"a layout has no {', '.join(unknown)}; fixed may have {', '.join(sorted(names))}")
    choices = {"schedule": tuple(PER_RANK), "recompute": RECOMPUTE, "zero": (0, 1, 2, 3), "dtype": DTYPES}
    for name, value in {**fixed, "dtype": dtype}.items():
        if name in choices and value not in choices[name]:
            raise ValueError(f"--{name} must be one of {', '.join(map(str, choices[name]))}; got {value!r}")


def _check(fixed: Mapping[str, Any], gpus: int, batch: int) -> None:
    for name, value in {"gpus": gpus, "batch": batch, **fixed}.items():
        if isinstance(value, int) and value < (0 if name == "zero" else 1):
            raise ValueError(f"--{name.replace('_', '-')} must be positive; got {value}")
    split = {name: fixed[name] for name in ("pp", "tp", "cp", "dp") if name in fixed}
    product, words = 1, " x ".join(f"--{name} {size}" for name, size in split.items())
    for size in split.values():
        product *= size
    if gpus % product or ({"pp", "tp", "dp"} <= split.keys() and product != gpus):
        raise ValueError(
            f"{words} = {product} does not divide --gpus {gpus}; choose --gpus as a multiple of {product}, or leave "
            "one of them to the search"
        )


def _nothing(found: Found, cluster: Cluster, gpus: int) -> str:
    if found.too_large is None:
        reason = found.refused.most_common(1)
        return reason[0][0] if reason else f"no layout of {gpus} ranks; give fewer flags"
    needs = found.too_large.memory.total / 1e9
    axes = found.too_large.layout
    return (
        f"nothing fits into {cluster.device.memory_gb:g} GB: of {found.does_not_fit} layouts the smallest needs "
        f"{needs:.1f} GB a rank (--pp {axes.pp} --tp {axes.tp} --dp {axes.dp} --ep {axes.ep} --micro-batch "
        f"{axes.micro_batch} --recompute {axes.recompute} --zero {axes.zero}); take more --gpus, --recompute full, a "
        "larger --pp or --tp, or --zero 1"
    )
