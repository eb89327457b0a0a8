"""Frozen parameters of a model with adapters: a checkpoint leaves them out, and says of which base it is."""

from __future__ import annotations

import json
import re

import torch
from torch import Tensor, nn

from ...moe.experts.low_rank import LowRank
from .together import CheckpointError, place

BASE = "base"  # name of the sums in a checkpoint
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number


def frozen_base(modules: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are frozen, adapters excepted, by name; none in a model without adapters (LoRA, PEFT's too)."""
    parameters = {re.sub(r"_orig_mod\.|_checkpoint_wrapped_module\.", "", n): p for n, p in modules.named_parameters()}
    ours = {id(p) for module in modules.modules() if isinstance(module, LowRank) for p in module.parameters()}
    adapters = {name for name, p in parameters.items() if id(p) in ours or ".lora_" in name}  # PEFT: lora_A, lora_B
    if not adapters:
        return {}
    return {name: p for name, p in parameters.items() if not p.requires_grad and name not in adapters}


def sums(base: dict[str, nn.Parameter]) -> str:
    """Dtype and sum of the bits of each frozen parameter that is whole on this rank, as JSON by names.

    Experts and others that are spread over ranks are left out: summing them would take collectives.
    """
    plain = {name: p.detach() for name, p in base.items() if type(p) is nn.Parameter and not p.is_meta}
    found: dict[str, Tensor] = {
        name: p.contiguous().view(_BITS[p.element_size()]).sum(dtype=torch.int64)
        for name, p in plain.items()
        if not p.is_complex()
    }
    return json.dumps({name: [str(plain[name].dtype), int(total)] for name, total in found.items()})


def check_base(saved: str, base: dict[str, nn.Parameter]) -> None:
    """Raise CheckpointError if a frozen parameter has other values than when the checkpoint was saved.

    A parameter of another dtype, or one that was spread over ranks then or is now, is not compared.
    """
    then, now = json.loads(saved), json.loads(sums(base))
    for name, (dtype, total) in now.items():
        if name in then and then[name][0] == dtype and then[name][1] != total:
            raise CheckpointError(
                f"it has adapters of another base: on rank {place()[0]}, the frozen parameter {name} has other values "
                "than when it was saved; load the same base first"
            )
