"""The words for an MoE layer in error messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .layer import MoE


def called(name: str) -> str:
    """The words for a layer, from its name in ``model.named_modules()``, which is empty if the model is the layer.

    >>> called("blocks.1.moe"), called("")
    ('layer blocks.1.moe', 'the MoE layer itself')
    """
    return f"layer {name}" if name else "the MoE layer itself"


def described(layer: MoE) -> str:
    """The words for a layer: its name, if it has one, and its sizes."""
    sizes = f"MoE(dim={layer.dim}, num_experts={layer.num_experts})"
    return sizes if layer.place is None else f"{called(layer.place.name)}, {sizes}"
