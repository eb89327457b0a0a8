"""Compare a family's module with the layer that replaces it, on small random copies of both."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...moe.experts.base import Experts
from .block_experts import FusedExperts
from .block_parts import Parts
from .block_twins import TOLERANCE, aside, count, relative_difference, tensors, twin
from .bridged import BridgedExperts, BridgedMoE

FEW = 4  # experts of which the copies have tensors, where experts are compared by themselves
T = 7  # tokens


@dataclass(frozen=True)
class Seen:
    """Outputs and gradients of a module by name, in eval mode and in training, and whether it returns a tuple."""

    values: dict[str, Tensor]
    pair: bool = False

    @classmethod
    def of(cls, call: Callable[..., Any], module: nn.Module, inputs: tuple[Tensor, ...]) -> Seen:
        """Run ``call(*inputs)``, which computes with `module`, and its backward, in both modes."""
        values, pair = {}, False
        for mode in ("eval", "training"):
            module.train(mode == "training")
            torch.manual_seed(1)  # of the noise that some routers add in training
            given = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
            taken = [x * 1 for x in given]  # not leaves: some blocks write to them
            y = call(*taken)
            if pair := isinstance(y, tuple):
                y = y[0]
            (y.flatten() * torch.linspace(-1, 1, y.numel())).sum().backward()
            values[f"the output in {mode} mode"] = y.detach()
            values |= {f"input {i} after the call in {mode} mode": x.detach() for i, x in enumerate(taken)}
            values |= {f"the gradient of input {i} in {mode} mode": x.grad for i, x in enumerate(given)}
        return cls({name: t for name, t in values.items() if t is not None}, pair)

    def with_gradients(self, module: nn.Module, but: nn.Module | None = None) -> Seen:
        """Add the gradients of a module's parameters, and leave out the parameters of the module `but`."""
        left = set() if but is None else {id(p) for p in but.parameters()}
        named = {n: p for n, p in module.named_parameters() if id(p) not in left and p.grad is not None}
        values = {**self.values, **{f"the gradient of {n}": p.grad for n, p in named.items()}}
        return Seen(values, self.pair)  # pyright: ignore[reportArgumentType]

    def differs_from(self, other: Seen) -> str | None:
        """Sentence about the first value that differs; None if all agree."""
        if self.pair != other.pair:
            return f"the {'original' if self.pair else 'replacement'} alone returns a tuple"
        both = {**other.values, **self.values}
        for name, t in both.items():
            nothing = torch.zeros_like(t)  # as a gradient of an expert that no token chose
            apart = relative_difference(self.values.get(name, nothing), other.values.get(name, nothing))
            if apart > TOLERANCE:
                return f"{name} differs by {apart:.1e} of its largest value (rounding is below {TOLERANCE:.0e})"
        return None


def takes_routing(experts: nn.Module) -> bool:
    """Whether experts are called with a routing: (x [T, D], expert [T, k], weight [T, k])."""
    if isinstance(experts, nn.ModuleList | nn.ModuleDict):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds for p in inspect.signature(type(experts).forward).parameters.values()) == 4


def experts_differ(module: nn.Module, make: Callable[[Any], FusedExperts]) -> str | None:
    """Compare a family's experts with the ones that `make` makes of them. A sentence, or None if they agree."""
    with aside():
        few = min(FEW, count(module))
        theirs, own = (twin(module, module, few) for _ in range(2))
        return _experts_apart(theirs, own, make(own), few)


def block_differs(block: Any, adapter: Callable[[Any], Parts]) -> str | None:
    """Compare a block with the layer of its `Parts`. A sentence, or None if they agree.

    If the block calls its experts with a routing, the experts are compared by themselves, and the block with stand-ins
    for them. So a large block needs little memory.
    """
    with aside():
        experts = getattr(block, "experts", None)
        if not isinstance(experts, nn.Module) or not takes_routing(experts):
            return _as_one(block, adapter)
        few = min(FEW, count(experts))
        theirs, own = (twin(block, experts, few) for _ in range(2))
        parts = adapter(own)
        if not isinstance(parts.experts, FusedExperts):
            return _as_one(block, adapter)
        lost = _lost(own, parts)
        if lost:
            return f"no part of the replacement holds {lost[0]}"
        return _experts_apart(theirs.experts, own.experts, parts.experts, few) or _rest_apart(theirs, own, parts)


def _as_one(block: Any, adapter: Callable[[Any], Parts]) -> str | None:
    """Compare the whole block at once."""
    theirs, own = twin(block), twin(block)
    parts = adapter(own)
    x = _tokens(parts.gate.dim)
    expected = Seen.of(theirs, theirs, (x,)).with_gradients(theirs)
    layer = BridgedMoE(own, parts)
    got = Seen.of(layer, layer, (x,))
    layer.give_back()
    return expected.differs_from(got.with_gradients(own))


def _experts_apart(theirs: Any, own: Any, experts: FusedExperts, few: int) -> str | None:
    """Compare two copies of a family's experts: `theirs` run themselves, and `experts` computes with `own`."""
    inputs = _routed(experts.dim, few + experts.identities)
    expected = Seen.of(lambda x, *routing: theirs(x, *routing).view_as(x), theirs, inputs).with_gradients(theirs)
    layer = BridgedExperts(own, experts)
    got = Seen.of(layer, layer, inputs)
    layer.give_back()
    return expected.differs_from(got.with_gradients(own))


def _rest_apart(theirs: Any, own: Any, parts: Parts) -> str | None:
    """Compare two copies of a block, both with stand-ins for their experts."""
    E, x = parts.gate.num_experts, _tokens(parts.gate.dim)
    theirs.experts, own.experts = _StandIn(E), None
    expected = Seen.of(theirs, theirs, (x,)).with_gradients(theirs, but=theirs.experts)
    layer = BridgedMoE(own, replace(parts, experts=_StandInExperts(E)))
    return expected.differs_from(Seen.of(layer, layer, (x,)).with_gradients(own))


class _StandIn(nn.Module):
    """Stand-in for a family's experts: expert e multiplies by a number of its own."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, num_experts))

    def forward(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        return x * (self.scale[expert] * weight).sum(-1).view(*x.shape[:-1], 1)


class _StandInExperts(Experts):
    """The same stand-in as an `Experts`."""

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts, seed=0)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, num_experts))

    def forward(self, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        scale = self.scale.repeat_interleave(counts, output_size=len(rows))
        return rows * (scale * weight).unsqueeze(1)

    def _initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        raise NotImplementedError


def _routed(dim: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, and a routing to at most two experts each: x, expert, weight."""
    draw = torch.Generator("cpu").manual_seed(3)
    expert = torch.rand(T, experts, generator=draw).topk(min(2, experts)).indices
    weight = torch.rand(expert.shape, generator=draw) + 0.1
    return torch.randn(T, dim, generator=draw), expert, weight


def _tokens(dim: int) -> Tensor:
    return torch.randn(2, T, dim, generator=torch.Generator("cpu").manual_seed(3))


def _lost(block: Any, parts: Parts) -> list[str]:
    """Names of tensors of the block, outside its experts, that no part has."""
    held = {id(t) for part in (parts.gate, parts.shared) if part is not None for t in tensors(part).values()}
    held |= {id(t) for t in tensors(block.experts).values()}
    return [name for name, t in tensors(block).items() if id(t) not in held]


def marks(module: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Facts that tell kinds of modules apart: classes, sizes, and attributes that are numbers, text or functions."""
    for name, m in module.named_modules():
        own = {k: v for k, v in vars(m).items() if k not in ("training", "layer_idx", "layer_id")}
        plain = {k: v for k, v in own.items() if isinstance(v, int | float | bool | str | None)}
        lists = {k: repr(v) for k, v in own.items() if isinstance(v, list | tuple) and not k.startswith("_")}
        functions = {k: id(v) for k, v in own.items() if callable(v)}
        yield name, type(m), *(tuple(sorted(d.items())) for d in (plain, lists, functions)), id(own.get("config"))
    for name, t in tensors(module).items():
        yield name, t.shape, t.dtype
