"""`autotune`: measure torch's and Triton's kernels for the experts, and choose the faster one."""

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
from ...cuda.tiles import MANY, MEASURED, Blocks, Product
from ...cuda.tune import Run, Shape
from ...dispatch.local import LocalDispatcher
from ...dispatch.plan import Plan
from ..experts import first_use
from ..experts.activation import ACTIVATIONS
from ..experts.feed_forward import FeedForwardExperts
from ..experts.four_bit import FourBitMatrix
from ..experts.sharded import held_slice
from ..experts.triton_path import check_triton
from ..layer import MoE, moe_layers
from .results import Machine, Name, Times, Tuned, Tuning, fastest, machine, read, write

log = logging.getLogger(__name__)
Clock = Callable[[Run], float]  # takes a run and returns its milliseconds


class _Rank(NamedTuple):
    """Facts about one rank that all ranks exchange before anything is measured."""

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
    """Measure torch's and Triton's kernels, and set `experts.kernel` of every `MoE` in a model to the faster one.

    Call it once, after `parallelize` and before training. Nothing is measured unless you call it. For each shape of
    experts it times the tile sizes of Triton's kernels, and keeps the fastest for the rest of the process. Then it
    times forward and backward with "torch" and with "triton". It uses random tensors and does not change the model's.
    It needs memory for a step of one more layer, and spends most of its time compiling. Where Triton's kernels cannot
    run, it chooses "torch", and the result says why. Only named experts have a kernel to choose.

    On many ranks it is a collective. The slowest rank's time counts, and a run that fails on one rank counts as failed,
    so that all ranks choose the same.

    Args:
        model: model with `MoE` layers, on its device.
        tokens: number of tokens T in a forward on one rank. With overlap it is the number in one chunk.
        dtype: dtype in which experts compute. None, the default, takes autocast's dtype if this call is under autocast,
            and otherwise the dtype of the weights.
        file: path of a JSON file. Its measurements are used if they come from the same GPU and versions. New ones are
            added to it. Only the first rank reads and writes it, and it is not used if ranks have different GPUs or
            versions. None, the default, uses no file.
        group: ranks that train the model. None, the default, takes all ranks.
        clock: function that runs its argument and returns milliseconds. None, the default, takes the median of
            `triton.testing.do_bench`.

    Returns:
        The times of all runs and the choices, as a `Tuning`.

    Raises:
        ValueError: no rank has named experts, `tokens` is not positive, the model is on the meta device, or the file
            has other content. It is raised on all ranks.

    >>> model = MoE(dim=8, hidden=16, num_experts=4)
    >>> autotune(model, tokens=64).experts[0].kernel  # Triton needs a GPU, and this model is on the CPU
    'torch'
    """
    layers = [layer for layer in moe_layers(model).values() if isinstance(layer.experts, FeedForwardExperts)]
    device = next((p.device for part in (*layers, model) for p in part.parameters()), torch.device("cpu"))
    wanted = [] if device.type == "meta" else [_wanted(layer, tokens, dtype) for layer in layers]
    reads = Path(file) if file is not None and _first(group) else None
    everyone = _gathered(_Rank.of(device, wanted, tokens, reads), group)
    if wrong := next((rank.wrong for rank in everyone if rank.wrong), ""):
        raise ValueError(wrong)
    asked = sorted({pair for rank in everyone for pair in rank.wanted})
    if not asked:
        raise ValueError(
            f"autotune is for experts of the named kinds, and {type(model).__name__} has none: do not call it here"
        )
    refused = {  # a shape is refused if any rank that has it cannot run Triton
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
        except OSError as error:  # not worth ending the job, and only this rank would raise
            log.warning("autotune could not write %s: %s", reads, error)
    return Tuning(tuple(found.values()))


def _wanted(layer: MoE, tokens: int, dtype: torch.dtype | None) -> tuple[Shape, str]:
    """The shape of a layer's experts on this rank, and the reason why Triton cannot compute them, or ""."""
    experts = layer.experts
    assert isinstance(experts, FeedForwardExperts)
    w_up, _ = experts.matrices()["up"]
    device = next(experts.parameters()).device
    if dtype is None:
        kind = device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else w_up.dtype
    held = slice(0, experts.hidden) if isinstance(w_up, FourBitMatrix) else held_slice(w_up)[2]
    hidden = held.stop - held.start  # less than H under expert tensor parallelism, whose ranks share their tokens
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
        precision=experts.precision or "",
    )
    before = experts.kernel
    try:
        check_triton(torch.empty(0, dtype=dtype, device=device), experts.activation)
        experts.kernel = "triton"
    except (TypeError, ValueError, NotImplementedError, ModuleNotFoundError) as error:
        return shape, str(error)
    experts.kernel = before
    return shape, ""


def _measured(shape: Shape, device: torch.device, group: ProcessGroup | None, clock: Clock) -> Tuned:
    """Measure experts of one shape. Every rank takes part in the same collectives, whatever fails."""
    tiles: dict[Product, Times[Blocks]] = {}
    with torch.cuda.device(device if device.type == "cuda" else -1):  # Triton launches and times on the current device
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
    except Exception as error:  # most likely out of memory
        log.warning("no tiles were measured for %s: %s", shape, _failure(error))
        return {}
    return {
        (product, size): _ms(partial(clock, run)) for product, runs in attempts.items() for size, run in runs.items()
    }


def _install(tiles: dict[Product, Times[Blocks]]) -> None:
    chosen = {product: best for product, times in tiles.items() if (best := fastest(times))}
    if not chosen.items() <= MEASURED.items():
        MEASURED.update(chosen)
        first_use.forget()


def _step(shape: Shape, device: torch.device, kernel: str) -> Run:
    """A function that runs one forward and backward of such experts, on tokens if `shape.gathers`, else on rows."""
    dtype, g = getattr(torch, shape.dtype), torch.Generator(device).manual_seed(0)
    many = shape.tokens * shape.top_k // shape.experts > MANY
    precision = shape.precision or None
    kind = device, dtype, shape.dim, shape.hidden, shape.activation, shape.bias, many, shape.gathers, precision
    if kernel == "triton" and not first_use.correct(*kind):
        raise RuntimeError("wrong at first use: see the warning")
    with torch.device("meta"):
        experts = FeedForwardExperts(shape.dim, shape.hidden, shape.experts, shape.activation, shape.bias)
    experts = experts.to(dtype).to_empty(device=device)
    experts.kernel, experts.precision = kernel, precision
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
    """The milliseconds that `measured` returns, or its error of any kind, so that other runs go on."""
    try:
        return float(measured())
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _on_the_gpu(run: Run) -> float:
    from triton.testing import do_bench

    median: Any = do_bench(run, rep=200, return_mode="median")  # do_bench empties the L2 cache before each run
    return median


def _slowest(times: Times[Name], group: ProcessGroup | None) -> Times[Name]:
    """The longest time of each run over all ranks, or an error if it failed on any; a collective with one result."""
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
