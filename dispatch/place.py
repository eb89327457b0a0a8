"""Which MoE layer an exchange belongs to, and which forward of that layer: what ranks compare before rows travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

TAGS = 2**31  # a message's tag is below


@dataclass(eq=False)
class Place:
    """The place of one MoE layer in its model. `parallelize` makes one for each layer, alike on all ranks.

    Attributes:
        model: a number drawn once for all layers of a `parallelize` call, the same on all ranks. It tells models apart.
        layer: which of the model's MoE layers this is.
        names: the names of all of them in the model.
        training: whether the layer is training, which `MoE.train` keeps.
        widest: the largest number of experts among the model's layers if they differ in it, else 0.
        forwards: how many forwards of the layer have started, recomputed ones too.
        parallelism: the layer's `parallelism`, -1 where all weights stay; ranks compare it.
        shadow: a number made of the layer's `shadow`, 0 without; ranks compare it.
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
        """The layer's name in the model."""
        return self.names[self.layer]

    def visit(self) -> Visit:
        """Start a forward. A rank that fails before its dispatch starts one as well, so that all ranks count alike."""
        self.forwards += 1
        return Visit(self, self.forwards, self.training, parallelism=self.parallelism, shadow=self.shadow)


class Visit(NamedTuple):
    """One forward of one layer.

    Attributes:
        place: the layer.
        forward: the number of this forward, from 1.
        training: whether the layer is training.
        chunks: how many exchanges of sizes it makes together (`OverlapDispatcher`).
        parallelism, shadow: those of the place when the forward started.
    """

    place: Place
    forward: int
    training: bool
    chunks: int = 1
    parallelism: int = -1
    shadow: int = 0

    @property
    def tag(self) -> int:
        """Marks the messages of this visit's backward, which then never meet those of another one."""
        return 1 + (self.place.model + 1_000_003 * self.place.layer + 7 * self.forward) % (TAGS - 1)

    def __str__(self) -> str:
        return f"layer {self.place.name!r}, forward {self.forward} ({'training' if self.training else 'evaluation'})"
