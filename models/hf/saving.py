"""Save a bridged model in its family's own format, while it stays spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ...moe.experts.placed import check_home
from ..checkpoint.together import on_first
from .adapters import has_peft_layers
from .bridged import BridgedMoE, Model, bridged_layers, restore_moe


@contextmanager
def restored(model: Model) -> Iterator[Model]:
    """Context in which a bridged model is the family's own model, whole, with the current weights.

    Tensors that `parallelize` or FSDP2 has sharded are gathered one by one into rank 0's main memory. On other ranks
    they are on the meta device. Afterwards the model is as before: parameters are the same objects, with their
    gradients, so training goes on. Call it on every rank.

    Args:
        model: a bridged model.

    Raises:
        ValueError: the model has no bridged layer, adapters (LoRA) that are not merged, or experts in 4 bits.
    """
    layers = _check_family(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation the root is whole, until `state_dict` shards it, which is too late
    modules = [*model.modules(), *(module for _, _, layer in layers for module in layer.block.modules())]
    before = [(module, name, p) for module in modules for name, p in module.named_parameters(recurse=False)]
    own_saves = [vars(module).pop("save_pretrained", None) for module in model.modules()]
    try:
        _gather(model)
        yield restore_moe(model)
    finally:
        for parent, name, layer in layers:
            setattr(parent, name, layer)
        for module, name, p in before:
            setattr(module, name, p)
        if any(isinstance(save, FamilySave) for save in own_saves):
            saves_its_family(model)


class FamilySave:
    """The `save_pretrained` of a bridged model. The one of transformers would write the bridge's names.

    One process calls it, as `Trainer` and users do. So it refuses experts that are spread over ranks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, folder: str | Path, *args: Any, **options: Any) -> None:
        """Call `save_pretrained` of the family's own model.

        Raises:
            ValueError: experts are spread over ranks, or a `state_dict` of the bridged model is given.
        """
        if any(isinstance(p, DTensor) for p in self.model.parameters()):
            raise ValueError(
                "model.save_pretrained writes what one process has, and this model is spread over ranks: call "
                "turnout.models.hf.save_pretrained(model, folder) on every rank, or train with MoETrainer"
            )
        if options.pop("state_dict", None) is not None:
            raise ValueError("a state_dict of a bridged model has other names than its family's: leave state_dict out")
        with restored(self.model) as own:
            cast(Any, own).save_pretrained(folder, *args, **options)


def saves_its_family(model: nn.Module) -> None:
    """Set `save_pretrained` of a bridged model, and of the models inside it, so that it writes the family's names."""
    for module in model.modules():
        bridged = any(isinstance(m, BridgedMoE) for m in module.modules())
        if bridged and callable(getattr(type(module), "save_pretrained", None)):
            cast(Any, module).save_pretrained = FamilySave(module)


def save_pretrained(model: nn.Module, folder: str | Path, **options: Any) -> None:
    """Write a bridged model in its family's format, on any mesh. The model stays as it is. Call it on every rank.

    Rank 0 writes tensor by tensor. Beside its part of the model it needs main memory for twice the largest tensor, the
    experts of a layer.

    Args:
        model: a bridged model.
        folder: folder for the files.
        options: further arguments of transformers' `save_pretrained`. With any other than ``max_shard_size``, such as
            ``push_to_hub``, transformers' own code writes, and rank 0 needs main memory for the whole model.

    Raises:
        ValueError: as for `restored`.
        CheckpointError: on every rank, if rank 0 cannot write.
    """
    if options.keys() <= {"max_shard_size"}:
        from .writing import write_pretrained  # needs transformers, which this package does not

        _check_family(model)
        write_pretrained(model, folder, **options)
        return
    with restored(model) as own:
        write = partial(cast(Any, own).save_pretrained, folder, **options)
        on_first(write) if dist.is_initialized() else write()


def _check_family(model: nn.Module) -> list[tuple[nn.Module, str, BridgedMoE]]:
    """The bridged layers. ValueError if the family's format cannot hold them; nothing is gathered before."""
    layers = bridged_layers(model)
    check_home(model, "the family's format is written")
    if any(layer.experts.adapts for _, _, layer in layers):
        raise ValueError("the family's format has no place for adapters: merge_lora(model) first")
    if has_peft_layers(model):
        raise ValueError(
            "the family's format has no place for PEFT's adapters, and PEFT would write them alone: model = "
            "merge_adapters(model) first, or save_adapters(model, folder)"
        )
    if any(layer.experts.in_four_bits for _, _, layer in layers):
        raise ValueError("the family's format has no place for 4 bits: dequantize_experts(model) first")
    return layers


@torch.no_grad()
def _gather(model: nn.Module) -> None:
    """Replace sharded parameters by whole ones: on rank 0's CPU, and on the meta device of other ranks."""
    device = "meta" if dist.is_initialized() and dist.get_rank() else "cpu"
    gathered: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters have two names
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if isinstance(p, DTensor):
                if p not in gathered:
                    gathered[p] = nn.Parameter(p.full_tensor().to(device), requires_grad=p.requires_grad)
                setattr(module, name, gathered[p])
