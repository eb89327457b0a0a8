"""What computes the experts, and in which tiles: measured when it is asked for, on the GPU at hand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from ...cuda import tune
from ...cuda.tiles import MEASURED, Blocks, Product
from ...cuda.tune import Run, Shape
from ...dispatch.local import LocalDispatcher
from ...dispatch.plan import Plan
from ..experts.activation import ACTIVATIONS
from ..experts.feed_forward import FeedForwardExperts
from ..experts.four_bit import FourBitMatrix
from ..experts.sharded import held_slice
from ..experts.triton_path import check_triton
from ..layer import MoE
from .results import Machine, Name, Times, Tuned, Tuning, fastest, machine, read, write

log = logging.getLogger(__name__)
Clock = Callable[[Run], float]  # milliseconds of a run


class _Rank(NamedTuple):
    """What ranks tell each other before anything is measured."""

    machine: Machine
    wanted: list[tuple[Shape, str]]
    known: list[Tuned]
    wrong: str

    @classmethod
    def of(cls, device: torch.device, wanted: list[tuple[Shape, str]], tokens: int, file: Path | None) -> _Rank:
        on, known = machine(device), []
        wrong = "" if tokens > 0 else f"tokens={tokens}: give the number of tokens of a forward, at least 1"
        if device.type == "meta":
            wrong = "the model is on the meta device: call autotune when it has its tensors, after to_empty(device=...)"
        try:
            known = [] if file is None else read(file, on)
        except (OSError, ValueError) as error:
            wrong = wrong or str(error)
        return cls(on, wanted, known, wrong)


def autotune(
    model: nn.Module,
    tokens: int,
    dtype: torch.dtype | None = None,
    file: str | Path | None = None,
    group: ProcessGroup | None = None,
    clock: Clock | None = None,
) -> Tuning:
    """Choose what computes the experts of a model by measuring it: sets `experts.kernel` of every `MoE` in it.

    Call it once before training, after `parallelize`; nothing is ever measured unasked. For each shape of experts it
    times the tiles of Triton's kernels, keeps the fastest for the rest of the process, then times forward and backward
    with "torch" and with "triton" and takes the faster. It works on random numbers beside the model, whose tensors it
    leaves alone, and needs memory for a step of one more layer. Most of its time goes into compiling. Where Triton's
    kernels cannot run the choice is "torch", and the result says why. Experts that are not one of the named kinds have
    nothing to choose.

    On many ranks it is a collective: a run counts as on the slowest rank, and one that fails on any rank has failed, so
    that all choose the same.

    Args:
        model: anything with `MoE` layers, on its device.
        tokens: T, the tokens of a forward on a rank (of a chunk, where travel overlaps with compute).
        dtype: in which experts compute; None: autocast's where this call is under it, else that of their weights.
        file: JSON. What it has, measured on the same GPU by the same versions, is not measured again; the rest is,
            and then the file is written again (by the first rank, which alone reads it). Not used where ranks have
            different GPUs or versions.
        group: the ranks that train the model; None: all of them.
        clock: what times a run; None: `triton.testing.do_bench`, the median.

    Raises:
        ValueError: no rank has such experts, no tokens, a file that holds something else; on all ranks.
    """
    layers = [m for m in model.modules() if isinstance(m, MoE) and isinstance(m.experts, FeedForwardExperts)]
    device = next((p.device for part in (*layers, model) for p in part.parameters()), torch.device("cpu"))
    wanted = [] if device.type == "meta" else [_wanted(layer, tokens, dtype) for layer in layers]
    reads = Path(file) if file is not None and _first(group) else None
    everyone = _gathered(_Rank.of(device, wanted, tokens, reads), group)
    if wrong := next((rank.wrong for rank in everyone if rank.wrong), ""):
        raise ValueError(wrong)
    asked = sorted({pair for rank in everyone for pair in rank.wanted})
    if not asked:
        raise ValueError(f"autotune chooses for experts of the named kinds, and {type(model).__name__} has none")
    refused = {  # by a rank that has such experts and cannot
        shape: f"rank {place}: {why}"
        for place, rank in enumerate(everyone)
        for shape, why in rank.wanted
        if why and (shape, "") not in rank.wanted
    }
    alike = all(rank.machine == everyone[0].machine for rank in everyone)
    known = {tuned.shape: tuned for tuned in everyone[0].known} if alike else {}
    found, clock = {}, clock or _on_the_gpu
    for shape, why in asked:
        if reason := why or refused.get(shape):
            tuned = Tuned(shape, why=reason)
        else:
            tuned = known.get(shape) or _measured(shape, device, group, clock)
        found[shape, why] = tuned
        _install(tuned.tiles)
    for layer, pair in zip(layers, wanted, strict=True):
        layer.experts.kernel = found[pair].kernel
    new = {tuned.shape: tuned for tuned in found.values() if not tuned.why and tuned.shape not in known}
    if reads is not None and alike and new:
        try:
            write(reads, everyone[0].machine, (known | new).values())
        except OSError as error:  # no reason to end a job that this rank alone would see
            log.warning("autotune could not write %s: %s", reads, error)
    return Tuning(tuple(found.values()))


def _wanted(layer: MoE, tokens: int, dtype: torch.dtype | None) -> tuple[Shape, str]:
    """The experts of a layer as this rank computes them, and why there is no choice, if so."""
    experts = layer.experts
    assert isinstance(experts, FeedForwardExperts)
    w_up, _ = experts.matrices()["up"]
    device = next(experts.parameters()).device
    if dtype is None:
        kind = device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else w_up.dtype
    held = slice(0, experts.hidden) if isinstance(w_up, FourBitMatrix) else held_slice(w_up)[2]
    hidden = held.stop - held.start  # less than H where experts are split inside, over ranks that share their tokens
    shape = Shape(
        tokens=tokens * (experts.hidden // hidden),
        dim=experts.dim,
        hidden=hidden,
        experts=len(experts.owned) if layer.dispatcher.groups else len(experts),
        top_k=min(layer.top_k, len(experts)),
        activation=experts.activation,
        bias=experts.bias,
        dtype=str(dtype).removeprefix("torch."),
        gathers=isinstance(layer.dispatcher, LocalDispatcher),
        gated=ACTIVATIONS[experts.activation].gated,
    )
    before = experts.kernel
    try:
        check_triton(torch.empty(0, dtype=dtype, device=device), experts.activation)
        experts.kernel = "triton"
    except (TypeError, ValueError, ModuleNotFoundError) as error:
        return shape, str(error)
    experts.kernel = before
    return shape, ""


def _measured(shape: Shape, device: torch.device, group: ProcessGroup | None, clock: Clock) -> Tuned:
    """The same on every rank; it takes part in as many collectives whatever fails."""
    tiles: dict[Product, Times[Blocks]] = {}
    with torch.cuda.device(device if device.type == "cuda" else -1):  # Triton launches and times on the current one
        for (product, size), ms in _slowest(_tile_times(shape, device, clock), group).items():
            tiles.setdefault(product, {})[size] = ms
        _install(tiles)
        times = {kernel: _ms(lambda k=kernel: clock(_step(shape, device, k))) for kernel in ("torch", "triton")}
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return Tuned(shape, _slowest(times, group), tiles)


def _tile_times(shape: Shape, device: torch.device, clock: Clock) -> Times[tuple[Product, Blocks]]:
    try:
        attempts = tune.attempts(shape, device)
    except Exception as error:  # no memory, most likely
        log.warning("no tiles were measured for %s: %s", shape, _failure(error))
        return {}
    return {
        (product, size): _ms(partial(clock, run)) for product, runs in attempts.items() for size, run in runs.items()
    }


def _install(tiles: dict[Product, Times[Blocks]]) -> None:
    MEASURED.update({product: best for product, times in tiles.items() if (best := fastest(times))})


def _step(shape: Shape, device: torch.device, kernel: str) -> Run:
    """Forward and backward of such experts: from tokens to tokens where all are on one rank, else from rows to rows."""
    dtype, g = getattr(torch, shape.dtype), torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        experts = FeedForwardExperts(shape.dim, shape.hidden, shape.experts, shape.activation, shape.bias)
    experts = experts.to(dtype).to_empty(device=device)
    experts.kernel = kernel
    parameters = list(experts.parameters())
    with torch.no_grad():
        for p in parameters:
            p.normal_(std=0.02, generator=g)
    expert = tune.drawn(shape, device)
    plan = Plan.of(expert, shape.experts)
    x = torch.randn(shape.tokens, shape.dim, generator=g, device=device).to(dtype)
    weight = torch.rand(expert.shape, generator=g, device=device)
    if not shape.gathers:
        x, weight = x[plan.token], weight.flatten()
    x, weight, grad = x.requires_grad_(), weight.requires_grad_(), torch.ones_like(x)

    def step() -> None:
        with torch.autocast(device.type, enabled=False):
            y = LocalDispatcher()(x, plan, weight, experts) if shape.gathers else experts(x, weight, plan.counts)
            torch.autograd.grad(y, [x, weight, *parameters], grad)

    return step


def _ms(measured: Callable[[], float]) -> float | str:
    """What was measured, or how it failed: of any kind, as the others go on."""
    try:
        return float(measured())
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _on_the_gpu(run: Run) -> float:
    from triton.testing import do_bench

    median: Any = do_bench(run, rep=200, return_mode="median")  # it empties the L2 cache before each run
    return median


def _slowest(times: Times[Name], group: ProcessGroup | None) -> Times[Name]:
    """Each run as on the rank where it took longest; failed if it did on any. A collective, the same on every rank."""
    everyones: list[Times[Name]] = _gathered(times, group)
    slowest: Times[Name] = {}
    for name in dict.fromkeys(name for own in everyones for name in own):
        each = [own.get(name, "not tried there") for own in everyones]
        failed = [f"rank {rank}: {ms}" if len(each) > 1 else ms for rank, ms in enumerate(each) if isinstance(ms, str)]
        slowest[name] = failed[0] if failed else max(ms for ms in each if isinstance(ms, float))
    return slowest


def _first(group: ProcessGroup | None) -> bool:
    return not dist.is_initialized() or dist.get_rank(group) == 0


def _gathered(own: Any, group: ProcessGroup | None) -> list[Any]:
    if not dist.is_initialized():
        return [own]
    everyones: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, own, group=group)
    return everyones
