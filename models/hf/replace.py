"""Hugging Face's MoE blocks out, `MoE` in, and back again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...moe.gates.gate import jittered
from ...moe.layer import MoE
from .block_experts import gather
from .block_parts import Parts
from .families import FAMILIES
from .router_loss import scale_router_loss

Adapter = Callable[[Any], Parts]
Model = TypeVar("Model", bound=nn.Module)


class BridgedMoE(MoE):
    """A `MoE` in the place of a family's block, made of its parts. No balance loss of ours: the model has its own.

    Args:
        block: the family's; kept, out of sight of `parameters()`, to be put back.
        parts: what an adapter made of it.
    """

    def __init__(self, block: nn.Module, parts: Parts) -> None:
        E = parts.experts.num_experts
        shared = 0 if parts.shared is None else parts.shared
        own = {"gate": parts.gate, "experts": parts.experts, "shared": shared}
        super().__init__(parts.gate.dim, hidden=1, num_experts=E, balance=0.0, seed=0, **own)  # 1: not looked at
        self.jitter, self.pair = parts.jitter, parts.pair
        self._block = (block,)  # in a tuple: not a submodule. Its tensors are those of the parts, spread or not
        self.train(block.training)

    def forward(self, x: Tensor, mask: Tensor | None = None, ids: Tensor | None = None) -> Any:
        """x (..., D) -> y (..., D), or (y, None) where the family's block returned a pair."""
        if self.training and self.jitter:
            x = jittered(x, self.jitter).to(x.dtype)
        if self.gate.takes_ids and ids is None and x.ndim > 2:  # gates of families that count by sequence
            ids = torch.arange(len(x), device=x.device).unsqueeze(1).expand(x.shape[:-1])
        y = super().forward(x, mask, ids)
        return (y, None) if self.pair else y

    def give_back(self) -> nn.Module:
        """The family's block, with the weights of now; where experts are spread, call it on every rank of theirs."""
        getattr(self.experts, "give_back", lambda: gather(self.experts))()
        return self.block.train(self.training)

    @property
    def block(self) -> nn.Module:
        """The family's block; its own tensors may be laid out otherwise, until it is given back."""
        return self._block[0]


def replace_moe(model: Model, adapters: Mapping[type[nn.Module], Adapter] | None = None) -> Model:
    """Put a `MoE` in the place of every MoE block of a Hugging Face model, in place; the same function as before.

    Routers, experts and shared experts are taken over, without a copy but for families that keep a module for each
    expert. Router logits are recorded as before, and the model's own auxiliary loss is computed from them. Then
    `parallelize` spreads the experts, and `save_pretrained` writes the family's format.

    Args:
        model: of transformers, or any module that holds blocks for which there are adapters.
        adapters: functions block -> `Parts` by the class of the block, beside those of `families.FAMILIES`, or in
            place of them: docs/guides/hugging_face.md has a guide.

    Raises:
        ValueError: no MoE block, or one without an adapter; the model is then as it was.
    """
    adapters = adapters or {}
    blocks = _blocks(model, adapters)
    found = [(parent, name, block, _adapter(path, block, adapters)) for path, parent, name, block in blocks]
    layers = [(parent, name, BridgedMoE(block, adapter(block))) for parent, name, block, adapter in found]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no MoE block that is known or has `experts`: pass "
            "adapters={its class: a function block -> Parts}; docs/guides/hugging_face.md says how to write one"
        )
    for place, (parent, name, layer) in enumerate(layers):
        layer.experts.seed = place  # what is drawn anew, or beside them (LoRA), differs from layer to layer
        setattr(parent, name, layer)
    scale_router_loss(model)
    return model


def restore_moe(model: Model) -> Model:
    """Undo `replace_moe`, in place, with the weights of now.

    Where experts are spread each rank gathers all of them: call it on every rank. To write the family's format while
    they are spread, and train on, there is `save_pretrained`.

    Raises:
        ValueError: nothing there that `replace_moe` put there.
    """
    for parent, name, layer in bridged_layers(model):
        setattr(parent, name, layer.give_back())
    return model


def bridged_layers(model: nn.Module) -> list[tuple[nn.Module, str, BridgedMoE]]:
    """Parent, name in it, and layer: what `replace_moe` put there, or ValueError if that is nothing."""
    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, BridgedMoE)
    ]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer that replace_moe put there")
    return layers


def _known(block: nn.Module, adapters: Mapping[type[nn.Module], Adapter]) -> Adapter | None:
    kind = type(block)
    if kind in adapters:
        return adapters[kind]
    # by name and place: other people's code may use the same names for another rule
    return FAMILIES.get(kind.__name__) if kind.__module__.startswith("transformers.") else None


def _adapter(path: str, block: nn.Module, adapters: Mapping[type[nn.Module], Adapter]) -> Adapter:
    adapter = _known(block, adapters)
    if adapter is None:
        kind = type(block).__name__
        raise ValueError(
            f"{path} is a {kind}, for which there is no adapter: write a function block -> Parts and pass "
            f"adapters={{{kind}: it}}; docs/guides/hugging_face.md says how"
        )
    return adapter


def _blocks(
    module: nn.Module, adapters: Mapping[type[nn.Module], Adapter], prefix: str = ""
) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Path, parent, name in it, and block: what is known, or has experts."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, MoE):
            continue
        if _known(child, adapters) or "experts" in dict(child.named_children()):
            yield path, module, name, child
        else:
            yield from _blocks(child, adapters, path)
