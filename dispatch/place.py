"""Which MoE layer an exchange belongs to, and which forward of it. Ranks compare this before rows travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

TAGS = 2**31  # tags of messages are smaller than this


@dataclass(eq=False)
class Place:
    """Which of a model's MoE layers this is. `parallelize` makes one for each layer, equal on all ranks.

    Attributes:
        model: random number that identifies the model: one for each `parallelize` call, the same on all ranks.
        layer: index of the layer among the model's MoE layers.
        names: the names of all MoE layers in the model.
        training: whether the layer is in training mode. `MoE.train` keeps it up to date.
        widest: the largest number of experts in any layer, or 0 if all layers have the same number.
        forwards: how many forwards of the layer have started. Recomputed forwards count too.
        parallelism: the layer's `parallelism`, or -1 if all weights stay where they are. Ranks compare it.
        shadow: number computed from the layer's `shadow`, 0 without. Ranks compare it.
    """

    model: int
    layer: int
    names: tuple[str, ...]
    training: bool
    widest: int = 0
    forwards: int = 0
    parallelism: int = -1
    shadow: int = 0

    @property
    def name(self) -> str:
        """Name of the layer in the model."""
        return self.names[self.layer]

    def start_call(self) -> LayerCall:
        """Count one more forward. A rank that fails before its dispatch counts it too, so that ranks stay in step."""
        self.forwards += 1
        return LayerCall(self, self.forwards, self.training, parallelism=self.parallelism, shadow=self.shadow)


class LayerCall(NamedTuple):
    """One forward of one MoE layer.

    Attributes:
        place: the layer.
        forward: number of this forward, from 1.
        training: whether the layer is in training mode.
        chunks: number of chunks that exchange their sizes together (`OverlapDispatcher`).
        parallelism, shadow: values that the place had when the forward started.
        max_rows: the budget of a `BoundedDispatcher`, 0 without one.
    """

    place: Place
    forward: int
    training: bool
    chunks: int = 1
    parallelism: int = -1
    shadow: int = 0
    max_rows: int = 0

    @property
    def tag(self) -> int:
        """Tag for the messages of this forward's backward, so that no other backward receives them."""
        return 1 + (self.place.model + 1_000_003 * self.place.layer + 7 * self.forward) % (TAGS - 1)

    def __str__(self) -> str:
        return f"layer {self.place.name!r}, forward {self.forward} ({'training' if self.training else 'evaluation'})"
