"""A bridged model in its family's own format, whole, while it goes on being spread over ranks."""

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

from ...moe.adapters.lora import lora_parameters
from ...moe.experts.sharded import whole
from ..checkpoint.together import on_first
from .replace import BridgedMoE, Model, bridged_layers, restore_moe

ADAPTERS = "adapters.safetensors"


@contextmanager
def restored(model: Model) -> Iterator[Model]:
    """Inside the `with`, the family's own model, whole, with the weights of now; afterwards, what it was before.

    What is spread over ranks, by `parallelize` or FSDP2, is gathered tensor by tensor into rank 0's main memory; on
    other ranks these tensors are on the meta device. Parameters are the same objects afterwards, with their gradients:
    training goes on. Call it on every rank.

    Raises:
        ValueError: nothing there that `replace_moe` put there, or adapters (LoRA) that are not merged.
    """
    layers = _check_family(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation the root is whole, until `state_dict` shards it, which is too late
    modules = [*model.modules(), *(module for _, _, layer in layers for module in layer.block.modules())]
    before = [(module, name, p) for module in modules for name, p in module.named_parameters(recurse=False)]
    try:
        _gather(model)
        yield restore_moe(model)
    finally:
        for parent, name, layer in layers:
            setattr(parent, name, layer)
        for module, name, p in before:
            setattr(module, name, p)


def save_pretrained(model: nn.Module, folder: str | Path, **options: Any) -> None:
    """`model.save_pretrained` of the family's own model; the bridged one stays as it is, and spread as it is.

    Rank 0 writes, tensor by tensor: beside its part of the model it needs main memory for the largest one, the experts
    of a layer, twice. Call it on every rank. `options` are those of transformers' method: ``max_shard_size``. With any
    other, such as ``push_to_hub``, its own code writes, and rank 0 needs main memory for the whole model.

    Raises:
        ValueError: nothing there that `replace_moe` put there, or adapters (LoRA) that are not merged.
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


@torch.no_grad()
def save_adapters(model: nn.Module, folder: str | Path) -> None:
    """Write the adapters (LoRA) of a model to `adapters.safetensors`, whole, by the names of `lora_parameters`.

    Rank 0 writes. Call it on every rank. ``model.load_state_dict(load_file(...), strict=False)`` puts them into a model
    that went through `replace_moe` and `add_lora` as this one did, before `parallelize`.

    Raises:
        CheckpointError: on every rank, if rank 0 cannot write.
    """
    adapters = {name: whole(p).cpu().contiguous() for name, p in lora_parameters(model).items()}

    def write() -> None:
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(adapters, Path(folder) / ADAPTERS)

    on_first(write) if dist.is_initialized() else write()


def _check_family(model: nn.Module) -> list[tuple[nn.Module, str, BridgedMoE]]:
    """The bridged layers, or ValueError if the family's format cannot hold them; before anything is gathered."""
    layers = bridged_layers(model)
    if any(layer.experts.adapts for _, _, layer in layers):
        raise ValueError("the family's format has no place for adapters: merge_lora(model) first")
    return layers


@torch.no_grad()
def _gather(model: nn.Module) -> None:
    """Put whole tensors in the place of spread parameters: on the CPU of rank 0, and nothing on other ranks."""
    device = "meta" if dist.is_initialized() and dist.get_rank() else "cpu"
    gathered: dict[nn.Parameter, nn.Parameter] = {}  # one that is tied goes by two names
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if isinstance(p, DTensor):
                if p not in gathered:
                    gathered[p] = nn.Parameter(p.full_tensor().to(device), requires_grad=p.requires_grad)
                setattr(module, name, gathered[p])
