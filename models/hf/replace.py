"""`replace_moe` puts an `MoE` in the place of each MoE block of a Hugging Face model."""

from __future__ import annotations

from typing import Any

from torch import nn

from .bridged import BridgedMoE, Model
from .recognise import Adapters, Rule, blocks, kind, refuse, rule
from .router_loss import scale_router_loss
from .saving import saves_its_family


def replace_moe(model: Model, adapters: Adapters | None = None, verify: bool = True) -> Model:
    """Put an `MoE` in the place of every MoE block of a Hugging Face model, in place. The model computes the same.

    Routers, experts and shared experts are used as they are. Only families with a module for each expert are copied,
    into one stack. If a block does more than route, its experts alone are replaced (`BridgedExperts`). Router logits
    are recorded as before, and the model computes its own auxiliary loss from them. Afterwards `parallelize` spreads
    the experts, and `save_pretrained` writes the family's format.

    Args:
        model: a model of transformers, or any module with blocks like theirs.
        adapters: functions block -> `Parts`, by the class of the block, for blocks that are not recognised.
            docs/guides/hugging_face.md says how to write one. None, the default, has none.
        verify: whether each kind of block is first compared with its replacement, which is the default. Outputs and
            all gradients are compared, in eval mode and in training, on small random copies in float32 on the CPU. A
            copy has few and narrow experts. False takes the first rule that seems to fit.

    Returns:
        The model.

    Raises:
        ValueError: the model has no MoE block, or one that cannot be replaced. The message has its name and the reason,
            and the model is unchanged.
    """
    adapters = adapters or {}
    rules: dict[tuple[Any, ...], Rule] = {}
    found = list(blocks(model, adapters))
    for each in found:  # all are looked at before any is changed
        if (own := kind(each.block)) not in rules:
            rules[own] = rule(each, adapters, verify)
        refuse(each, rules[own])
    layers: list[tuple[nn.Module, str, BridgedMoE]] = []
    try:
        for each in found:
            own = rules[kind(each.block)]
            place = (each.block, own.child) if own.child else (each.parent, each.name)
            layers.append((*place, own.layer(each.block)))
    except Exception:
        for _, _, layer in layers:
            layer.give_back()
        raise
    if not layers:
        raise ValueError(_nothing(model))
    for number, (parent, name, layer) in enumerate(layers):
        layer.experts.seed = number  # what is drawn anew, or beside them (LoRA), differs from layer to layer
        setattr(parent, name, layer)
    scale_router_loss(model)
    saves_its_family(model)
    return model


def _nothing(model: nn.Module) -> str:
    name = type(model).__name__
    if any(isinstance(m, BridgedMoE) for m in model.modules()):
        return f"{name} went through replace_moe before, and its MoE blocks are ours: restore_moe(model) undoes it"
    return (
        f"{name} has no MoE block that is known or has `experts`: pass adapters={{its class: block -> Parts}}; "
        "docs/guides/hugging_face.md says how to write one"
    )
