"""Router replay: record which experts each token visits, and send the same tokens to them again.

Reinforcement learning trains on text that another program has sampled. The two programs round differently, so some
tokens visit other experts in training than in sampling. That can make training collapse, and replaying the recorded
choice prevents it (Ma et al. 2025, arXiv:2510.11370). Weights come from the current router, so it still learns.
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
from .layer import MoE, moe_layers
from .names import described
from .routing import Routing, Tap

__all__ = ["Routings", "record", "replay"]


@dataclass(frozen=True)
class Routings:
    """The experts of each token in each layer, which `record` collects and `replay` uses.

    Attributes:
        by_layer: expert ids int64 [tokens, k] for each name of a `MoE` layer, -1 where a token has no expert. Tokens
            of several forwards follow each other.
    """

    by_layer: dict[str, Tensor] = field(default_factory=dict)

    @property
    def ids(self) -> Tensor:
        """All expert ids, int64 [layers, tokens, k] on the CPU, with layers in the model's order.

        Layers with fewer choices than the largest k are filled up with -1. Raises ValueError if the layers have
        different numbers of tokens.
        """
        tokens = {name: len(ids) for name, ids in self.by_layer.items()}
        if len(set(tokens.values())) > 1:
            raise ValueError(f"layers saw different numbers of tokens, {tokens}: use by_layer, not one tensor")
        widest = max((ids.shape[1] for ids in self.by_layer.values()), default=0)
        filled = [F.pad(ids.cpu(), (0, widest - ids.shape[1]), value=-1) for ids in self.by_layer.values()]
        return torch.stack(filled) if filled else torch.zeros(0, 0, 0, dtype=torch.int64)

    def numpy(self) -> np.ndarray:
        """`ids` as a NumPy array."""
        return self.ids.numpy()


@contextmanager
def record(model: nn.Module) -> Iterator[Routings]:
    """Record the experts that each token visits, in all `MoE` layers of a model.

    Each forward inside the context adds its tokens, in training and in eval mode. Forwards that activation
    checkpointing computes again add nothing. Choices are recorded before capacity drops any.

    Args:
        model: model with `MoE` layers, or the part of it that this rank has. Each rank records its own tokens.

    Yields:
        `Routings` that are filled when the context ends.

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
    """Send tokens to recorded experts instead of the router's own choice.

    The first forward of a layer uses the first rows of its record, and the next forward the rows after them. A forward
    that activation checkpointing computes again uses the rows of the forward with the same tokens, also if backward
    runs after the context. Weights, scores, balance losses and gradients come from the current router (`Gate.weigh`).

    Args:
        model: model with `MoE` layers, or the part of it that this rank has.
        routings: recorded expert ids, from any mesh or framework, with -1 for no expert. `Routings`, a mapping from
            names of layers to integers [tokens, k], or a tensor or array [layers, tokens, k] in the model's order of
            layers. Each rank passes the rows of its own tokens. Names that the model does not have are ignored.

    Raises:
        ValueError: layers, expert ids or numbers of tokens do not fit. The message names the layer.
        TypeError: a gate cannot weigh experts that it has not chosen, or routings are of another type.
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
    if not isinstance(by_layer, Mapping):
        raise TypeError(
            "routings must be Routings, a mapping by names of layers, or a tensor or array [layers, tokens, k]; got "
            f"{type(by_layer).__name__}"
        )
    if missing := [name for name in layers if name not in by_layer]:
        raise ValueError(f"routings have no layer {missing[0]!r}; they have {', '.join(map(repr, by_layer)) or 'none'}")
    taps = {name: _Player(name, layer.gate, by_layer[name]) for name, layer in layers.items()}
    with _tapped(layers, taps):
        yield
    for tap in taps.values():
        tap.check_end()


def named_layers(model: nn.Module) -> dict[str, MoE]:
    """The `MoE` layers of a model by name. Names are the ones from `parallelize`, so that pipeline stages keep them."""
    found = moe_layers(model)
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
            tap.ended = True  # it stays on the layer, because a later backward may recompute forwards


class _Recorder:
    """Keeps the expert ids of each forward of one layer, in the smallest dtype that holds them."""

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
    """Replaces the choices of one layer's gate by the rows of its record."""

    def __init__(self, name: str, gate: Gate, given: Any) -> None:
        self.name, ids = name, torch.as_tensor(given)
        if ids.ndim != 2 or not ids.shape[1] or ids.dtype.is_floating_point or ids.dtype == torch.bool:
            raise ValueError(
                f"routings of layer {name!r} must be integers [tokens, k], k of at least 1; got "
                f"{ids.dtype} {tuple(ids.shape)}"
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
        self.forwards: list[tuple[Tensor, Tensor]] = []  # `_marks` and expert ids of the tokens of each forward

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
        self.forwards.append((_marks(tokens), expert))
        return _sent(gate, routing, expert)

    def _again(self, gate: Gate, tokens: Tensor, routing: Routing) -> Routing:
        """The routing of the forward that had these tokens, or the gate's own if none had. The host waits for it."""
        marks = _marks(tokens)
        same = [(torch.dist(other, marks), expert) for other, expert in self.forwards if len(expert) == len(tokens)]
        if not same:
            return routing
        distance, expert = min(same, key=lambda forward: float(forward[0]))
        # a GPU may round differently; marks of other tokens are further apart than they are long
        return _sent(gate, routing, expert) if bool(distance <= 0.1 * marks.norm()) else routing

    def check_end(self) -> None:
        """Raise ValueError if rows of the record are left."""
        if self.next != len(self.ids):
            raise ValueError(
                f"routings of layer {self.name!r} have {len(self.ids)} tokens, but only {self.next} were replayed"
            )


def _sent(gate: Gate, routing: Routing, expert: Tensor) -> Routing:
    """The routing of the same tokens to other experts, given by ids int64 [T, k]."""
    sent = replace(routing, expert=expert, weight=gate.weigh(routing, expert)).keep(expert >= 0)
    return sent if routing.mask is None else sent.masked(routing.mask)


def _marks(tokens: Tensor) -> Tensor:
    """A number for each of the tokens [T, D], float32 [T], by which a recomputed forward knows them again.

    It is the token along one direction. Sums of sizes would not do: they are nearly the same for any normalised tokens.
    """
    D = tokens.shape[1]
    direction = torch.arange(1, D + 1, device=tokens.device, dtype=torch.float32).cos() / D**0.5
    return (tokens.detach() @ direction.to(tokens.dtype)).float()
