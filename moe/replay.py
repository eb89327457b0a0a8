"""Router replay: record which experts each token went to, and send the same tokens there again.

Reinforcement learning trains on text that another program has sampled. The two programs round differently, so in
training some tokens go to other experts than in sampling. That can make training collapse, and replaying the recorded
choice cures it (Ma et al. 2025, arXiv:2510.11370). Weights are computed from the current router, so it still learns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch.torch_internals import in_backward
from .gates.gate import Gate
from .layer import MoE, described
from .routing import Routing, Tap

__all__ = ["Routings", "record", "replay"]


@dataclass(frozen=True)
class Routings:
    """The experts that tokens went to, by layer: what `record` fills and `replay` reads.

    Attributes:
        by_layer: name of each `MoE` layer -> int64 [tokens, k], -1 where a token had no expert. Tokens of several
            forwards follow each other.
    """

    by_layer: dict[str, Tensor] = field(default_factory=dict)

    @property
    def ids(self) -> Tensor:
        """int64 [layers, tokens, k] on the CPU, layers in the model's order; filled up with -1 to the largest k."""
        tokens = {name: len(ids) for name, ids in self.by_layer.items()}
        if len(set(tokens.values())) > 1:
            raise ValueError(f"layers saw different numbers of tokens, which one tensor cannot hold: {tokens}")
        widest = max((ids.shape[1] for ids in self.by_layer.values()), default=0)
        filled = [F.pad(ids.cpu(), (0, widest - ids.shape[1]), value=-1) for ids in self.by_layer.values()]
        return torch.stack(filled) if filled else torch.zeros(0, 0, 0, dtype=torch.int64)

    def numpy(self) -> np.ndarray:
        """`ids` as an array."""
        return self.ids.numpy()


@contextmanager
def record(model: nn.Module) -> Iterator[Routings]:
    """Record the experts that every token goes to, in all `MoE` layers of a model.

    Each forward inside the context adds its tokens, in training and in evaluation. Forwards that activation
    checkpointing computes again add nothing. Capacity has no part in it: tokens are recorded before it drops any.

    Args:
        model: a model with `MoE` layers, or the part of one that this rank has. Every rank records its own tokens.

    Yields:
        `Routings`, complete when the context ends.

    >>> from turnout.moe import MoE
    >>> model, x = nn.Sequential(MoE(8, 16, 4, seed=0), MoE(8, 16, 4, seed=1)), torch.randn(10, 8)
    >>> with record(model) as routings:
    ...     y = model(x)
    >>> routings.ids.shape  # layers, tokens, k
    torch.Size([2, 10, 2])
    >>> with replay(model, routings.numpy()):
    ...     same = model(x)
    >>> bool((same == y).all())
    True
    """
    layers = named_layers(model)
    taps = {name: _Recorder(layer.gate.num_experts) for name, layer in layers.items()}
    routings = Routings()
    with _tapped(layers, taps):
        yield routings
    routings.by_layer.update({name: tap.ids() for name, tap in taps.items()})


@contextmanager
def replay(model: nn.Module, routings: Routings | Mapping[str, Any] | Tensor | np.ndarray) -> Iterator[None]:
    """Send tokens to recorded experts, whatever the router would choose now.

    The first forward of a layer takes the first rows of its record, the next forward the rows after these. A forward
    that activation checkpointing computes again takes the rows of the forward that had the same tokens, also if the
    backward runs after the context. Weights, scores,
    balance losses and gradients come from the current router (`Gate.weigh`).

    Args:
        model: a model with `MoE` layers, or the part of one that this rank has.
        routings: what `record` gave, on any mesh and from any framework: `Routings`, a mapping from names of layers to
            [tokens, k], or a tensor or array [layers, tokens, k] for the layers in the model's order. Integers, -1 for
            no expert. Each rank gives the rows of its own tokens; names that the model has not are left out.

    Raises:
        ValueError: rows that do not fit: other layers, experts or numbers of tokens. It names the layer.
        TypeError: a gate that cannot weigh experts it has not chosen.
    """
    layers = named_layers(model)
    if isinstance(routings, Tensor | np.ndarray):
        given = torch.as_tensor(routings)
        if given.ndim != 3 or len(given) != len(layers):
            raise ValueError(
                f"routings must be [layers, tokens, k] for {len(layers)} MoE layers; got {tuple(given.shape)}"
            )
        routings = dict(zip(layers, given, strict=True))
    by_layer = routings.by_layer if isinstance(routings, Routings) else routings
    if missing := [name for name in layers if name not in by_layer]:
        raise ValueError(f"routings have no layer {missing[0]!r}; they have {', '.join(map(repr, by_layer)) or 'none'}")
    taps = {name: _Player(name, layer.gate, by_layer[name]) for name, layer in layers.items()}
    with _tapped(layers, taps):
        yield
    for tap in taps.values():
        tap.check_end()


def named_layers(model: nn.Module) -> dict[str, MoE]:
    """The `MoE` layers of a model by name: by that which they had in `parallelize`, so that stages keep theirs."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no MoE layer")
    by_place = {name if layer.place is None else layer.place.name: layer for name, layer in found.items()}
    return by_place if len(by_place) == len(found) else found


@contextmanager
def _tapped(layers: Mapping[str, MoE], taps: Mapping[str, Tap]) -> Iterator[None]:
    for layer in layers.values():
        if layer.tap is not None and not layer.tap.ended:
            raise RuntimeError(f"{described(layer)} is being recorded or replayed already: end that context first")
    for name, layer in layers.items():
        layer.tap = taps[name]
    try:
        yield
    finally:
        for tap in taps.values():
            tap.ended = True  # it stays, for the backward may come later and compute forwards again


class _Recorder:
    """Keeps the experts of each forward, in as few bytes as their numbers need."""

    def __init__(self, num_experts: int) -> None:
        self.dtype = torch.int16 if num_experts < 2**15 else torch.int32
        self.seen: list[Tensor] = []
        self.ended = False

    def __call__(self, gate: Gate, tokens: Tensor, routing: Routing) -> Routing:
        if not self.ended and not in_backward():
            self.seen.append(routing.expert.to(self.dtype))
        return routing

    def ids(self) -> Tensor:
        widest = max((expert.shape[1] for expert in self.seen), default=0)
        filled = [F.pad(expert, (0, widest - expert.shape[1]), value=-1) for expert in self.seen]
        return (torch.cat(filled) if filled else torch.zeros(0, 0)).to(torch.int64)


class _Player:
    """Hands out the rows of one layer's record."""

    def __init__(self, name: str, gate: Gate, given: Any) -> None:
        self.name, ids = name, torch.as_tensor(given)
        if ids.ndim != 2 or ids.dtype.is_floating_point or ids.dtype == torch.bool:
            raise ValueError(
                f"routings of layer {name!r} must be integers [tokens, k]; got {ids.dtype} {tuple(ids.shape)}"
            )
        ids = ids.to(torch.int64)
        if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < gate.num_experts:
            raise ValueError(
                f"routings of layer {name!r} name experts from {int(ids.min())} to {int(ids.max())}, but the layer "
                f"has 0 to {gate.num_experts - 1}, and -1 for none"
            )
        ordered = ids.sort(1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
            raise ValueError(f"routings of layer {name!r} name an expert twice for one token")
        self.ids, self.next, self.ended = ids, 0, False
        self.forwards: list[tuple[Tensor, Tensor]] = []  # `_mark` of the tokens, and where they went

    def __call__(self, gate: Gate, tokens: Tensor, routing: Routing) -> Routing:
        if self.ids.device != tokens.device:
            self.ids = self.ids.to(tokens.device)
        if in_backward():
            return self._again(gate, tokens, routing)
        if self.ended:
            return routing
        T = len(tokens)
        if self.next + T > len(self.ids):
            raise ValueError(
                f"routings of layer {self.name!r} have {len(self.ids)} tokens, of which {self.next} are replayed; "
                f"this forward has {T} more"
            )
        expert = self.ids[self.next : self.next + T]
        self.next += T
        self.forwards.append((_mark(tokens), expert))
        return _sent(gate, routing, expert)

    def _again(self, gate: Gate, tokens: Tensor, routing: Routing) -> Routing:
        """Where the forward sent these tokens; the gate's own choice if they were in none. The host waits for it."""
        mark = _mark(tokens)
        for other, expert in self.forwards:
            if len(expert) == len(tokens) and torch.allclose(other, mark, rtol=1e-4):  # a GPU may round differently
                return _sent(gate, routing, expert)
        return routing

    def check_end(self) -> None:
        """ValueError if rows are left."""
        if self.next != len(self.ids):
            raise ValueError(
                f"routings of layer {self.name!r} have {len(self.ids)} tokens, but only {self.next} were replayed"
            )


def _sent(gate: Gate, routing: Routing, expert: Tensor) -> Routing:
    """The routing of the same tokens to these experts, int64 [T, k]."""
    sent = replace(routing, expert=expert, weight=gate.weigh(routing, expert)).keep(expert >= 0)
    return sent if routing.mask is None else sent.masked(routing.mask)


def _mark(tokens: Tensor) -> Tensor:
    """float64 [2]: sums over tokens [T, D] that a recomputed forward finds again, and other tokens do not have."""
    wide = tokens.detach().double()
    place = torch.arange(1, len(wide) + 1, device=wide.device, dtype=torch.float64)
    by_token = wide.abs().sum(1)
    return torch.stack([by_token.sum(), (by_token * place).sum()])
