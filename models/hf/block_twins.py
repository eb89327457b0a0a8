"""Small random copies of a family's modules, in float32 on the CPU, with which two implementations are compared."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5  # of the largest value, in float32
NARROW = 32  # hidden width H of experts in a copy
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def aside() -> Iterator[None]:
    """Context in which tensors are made on the CPU, with gradients, and the caller's random state is kept."""
    cpu = torch.device("cpu")
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), cpu, torch.autocast("cpu", enabled=False):
        yield


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def twin(module: nn.Module, experts: nn.Module | None = None, few: int = 0) -> Any:
    """A copy of a module with random weights, the same in each call. The module's own weights are not read.

    Args:
        module: the module.
        experts: stacked experts in the module, or the module itself. The copy has `few` narrow ones. None, the default,
            keeps all sizes.
        few: number of experts in the copy.
    """
    draw = torch.Generator("cpu").manual_seed(5)
    memo: dict[int, Any] = {id(getattr(m, name)): OrderedDict() for m in module.modules() for name in HOOKS}
    shapes = {} if experts is None else {id(t): s for t, s in _cut(experts, few)}
    for name, t in tensors(module).items():
        memo[id(t)] = _drawn(name, t, shapes.get(id(t), t.shape), draw)
    copied = copy.deepcopy(module, memo)
    own: Any
    for own in copied.modules():
        if hasattr(own, "_old_forward"):  # wrapped by accelerate, for another device
            own.forward = own._old_forward
        if getattr(getattr(own, "config", None), "_experts_implementation", "eager") != "eager":
            own.config._experts_implementation = "eager"
    for own in [] if experts is None else memo[id(experts)].modules():
        numbers = {k: v for k, v in vars(own).items() if "experts" in k and type(v) is int}
        vars(own).update({k: v * few // count(experts) for k, v in numbers.items()})  # pyright: ignore
    return copied


def _cut(experts: nn.Module, few: int) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Each tensor of stacked experts, with its shape for `few` experts of hidden width NARROW at most."""
    held, number = tensors(experts), count(experts)
    transposed = getattr(experts, "is_transposed", False)
    inner = {"gate_up_proj": 2 if transposed else 1, "up_proj": 2 if transposed else 1}  # the axis of H, or of 2H
    inner |= {"gate_up_proj_bias": 1, "up_proj_bias": 1, "down_proj": 1 if transposed else 2}
    down = held.get("down_proj")
    width = None if down is None or down.ndim != 3 else down.shape[inner["down_proj"]]
    for name, t in held.items():
        shape = list(t.shape)
        if t.ndim > 1 or len(t) == number:  # others are shared
            shape[0] = len(t) * few // number
        if width is not None and name in inner and t.ndim > inner[name]:
            shape[inner[name]] = shape[inner[name]] // width * min(width, NARROW)
        yield t, tuple(shape)


def count(experts: nn.Module) -> int:
    """Number E of a family's stacked experts."""
    own, down = getattr(experts, "num_experts", None), getattr(experts, "down_proj", None)
    return len(down) if isinstance(down, Tensor) else own if isinstance(own, int) else len(next(experts.parameters()))


def score_of(router: nn.Module) -> str:
    """The score from which a router makes its weights, "sigmoid" or "softmax". Any other counts as softmax.

    Raises:
        ValueError: the router does not return (logits [T, E], weight [T, k], expert [T, k]) for x [T, D].
    """
    with aside():
        own: Any = twin(router).eval()
        E, dim = own.weight.shape
        torch.manual_seed(1)
        try:
            logits, weight, expert = own(torch.randn(9, dim))
            shapes = [tuple(t.shape) for t in (logits, weight, expert)]
        except Exception as error:
            raise ValueError(f"{type(router).__name__} is not called as router(x [T, D]): {error}") from error
        if shapes != [(9, E), (9, own.top_k), (9, own.top_k)] or expert.is_floating_point():
            raise ValueError(f"{type(router).__name__} must return logits [T, E], weights and experts [T, k]")
        shares = weight / logits.sigmoid().gather(1, expert)  # the same for all choices of a token, or of all, if k = 1
        alike = (shares / (shares[:, :1] if own.top_k > 1 else shares[:1]) - 1).abs() < 1e-3
    return "sigmoid" if bool(alike.all()) else "softmax"


def relative_difference(expected: Tensor, got: Tensor) -> float:
    """Largest difference, relative to the largest expected magnitude."""
    if expected.shape != got.shape:
        return float("inf")
    apart = (expected - got).abs().max() / expected.abs().max().clamp(min=1e-20)
    return float(apart) if apart.isfinite() else float("inf")


def _drawn(name: str, t: Tensor, shape: Any, draw: torch.Generator) -> Tensor:
    if not t.is_floating_point():
        values = torch.zeros(shape, dtype=t.dtype, device="cpu") if t.is_meta else t.detach().cpu()[: shape[0]]
        return nn.Parameter(values, requires_grad=False) if isinstance(t, nn.Parameter) else values
    values = torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-1.7, 1.7, generator=draw)  # variance 1
    if t.ndim > 1:
        values *= 2 * t.shape[-1] ** -0.5
    elif "bias" in name or not isinstance(t, nn.Parameter):
        values *= 0.1
    else:  # of a norm
        values = 1 + 0.2 * values
    return nn.Parameter(values) if isinstance(t, nn.Parameter) else values
