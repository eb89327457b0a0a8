"""Compare MoE layers between ranks: options, shapes, and checksums of parameters and buffers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ...dispatch.agreement import told
from ..experts.base import Experts
from ..experts.low_rank import LowRank
from ..experts.sharded import held_slice, local
from ..gates.hash import FIRST, mixed
from ..layer import MoE
from ..names import called

Notes = dict[str, str]  # facts about a rank's model, name to value, which should be equal on all ranks
VALUES, SHOWN = "the values of ", 4


def agree(
    layers: dict[str, MoE], others: Notes, fault: Exception | None, group: ProcessGroup | None, when: str
) -> None:
    """Raise on every rank of a group unless all ranks have the same layers and no rank has a `fault`.

    Experts with equal values may have been built with different seeds. They get the first rank's seed, so that a later
    `reset_parameters` gives equal values again.

    Args:
        layers: MoE layers by name.
        others: further facts that must be equal.
        fault: error that this rank has found already. Other ranks raise a ValueError with its text.
        group: ranks to compare. None is this rank alone.
        when: words for the error that say by when weights must be equal.
    """
    if group is None:
        if fault is not None:
            raise fault
        return
    notes = others | {key: said for name, layer in layers.items() for key, said in facts(name, layer)}
    digest = hashlib.blake2b(repr(notes).encode(), digest_size=16).hexdigest()
    seeded = [module for layer in layers.values() for module in _seeded(layer)]
    mine = None if fault is None else str(fault), digest, [module.seed for module in seeded]
    everyones = gathered(mine, group)
    ranks = dist.get_process_group_ranks(group)
    if fault is not None:
        raise fault
    for rank, (text, _, _) in zip(ranks, everyones, strict=True):
        if text is not None:
            raise ValueError(f"rank {rank}: {text}")
    if any(theirs != everyones[0][1] for _, theirs, _ in everyones):
        found = differences(gathered(notes, group), ranks)
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ValueError(
            f"MoE layers differ between ranks: {'; '.join(found[:SHOWN])}{more}. Build the model with the same "
            f"arguments and under the same torch.manual_seed on every rank, or load the same weights on all of them, "
            f"{when}"
        )
    for module, seed in zip(seeded, everyones[0][2], strict=True):
        module.seed = seed


def gathered(mine: Any, group: ProcessGroup | None) -> list[Any]:
    """The `mine` of every rank of a group, in the order of ranks."""
    everyones: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, mine, group=group)
    return everyones


def differences(everyones: Sequence[Notes], ranks: Sequence[int], whole: bool = True) -> list[str]:
    """Sentences about the facts that differ between ranks. A fact that a rank lacks counts as different if `whole`."""
    found = []
    for key in dict.fromkeys(key for notes in everyones for key in notes):
        said: dict[str, list[int]] = {}
        for rank, notes in zip(ranks, everyones, strict=True):
            if whole or key in notes:
                said.setdefault(notes.get(key, "missing"), []).append(rank)
        if len(said) < 2:
            continue
        if key.startswith(VALUES) and "missing" not in said:
            first, *_ = said.values()
            others = [rank for rank in ranks if rank not in first]
            found.append(f"{key} on {told(others)} differ from {told(first)}")
        else:
            found.append(f"{key} is {', '.join(f'{what} on {told(where)}' for what, where in said.items())}")
    return found


def facts(name: str, layer: MoE) -> Iterator[tuple[str, str]]:
    """Facts about one layer that must be equal on all ranks: options, checksums, and on meta the experts' seed."""
    yield from options(name, layer)
    yield from values(layer, behind=f" of {called(name)}")
    if any(t.is_meta for t in layer.experts.parameters()):
        yield f"the seed of the experts of {called(name)}", f"{layer.experts.seed}"


def options(name: str, layer: MoE) -> Iterator[tuple[str, str]]:
    """Arguments of a layer, its gate, its experts and its other parts, each with its name."""
    for option in ("num_experts", "capacity", "balance", "parallelism", "shadow"):
        yield f"{option} of {called(name)}", repr(getattr(layer, option))
    yield f"experts.weight_on of {called(name)}", repr(layer.experts.weight_on)
    yield f"experts.precision of {called(name)}", repr(layer.experts.precision)
    if layer.experts.placement is not None:
        yield f"experts.order of {called(name)}", repr(layer.experts.order)
    for own, module in layer.named_modules():
        if own:
            yield f"{own} of {called(name)}", _attributes(module)


def values(
    module: nn.Module, kinds: Sequence[str] = ("parameter", "buffer"), behind: str = ""
) -> Iterator[tuple[str, str]]:
    """Shape and checksum of each parameter and buffer of a module. A sharded one has the checksum of its local part."""
    for kind in kinds:
        for own, t in module.named_parameters() if kind == "parameter" else module.named_buffers():
            yield f"{kind} {own}{behind}", f"{tuple(t.shape)} {t.dtype}"
            if not t.is_meta:
                yield f"{VALUES}{kind} {held_name(own, t)}{behind}", f"{checksum(local(t.detach())):x}"


def held_name(name: str, tensor: Tensor) -> str:
    """A tensor's name, for a DTensor with the part that this rank holds: "w_up[2:4, 0:8]"."""
    parts = ", ".join(f"{part.start}:{part.stop}" for part in held_slice(tensor))
    return f"{name}[{parts}]" if isinstance(tensor, DTensor) else name


def checksum(tensor: Tensor, chunk: int = 1 << 20) -> int:
    """Checksum of a tensor's bits in their order. A change of a single element always changes it.

    >>> checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([2.0, 1.0]))
    False
    """
    return checksums([tensor], chunk)[0]


@torch.no_grad()
def checksums(tensors: Sequence[Tensor], chunk: int = 1 << 16) -> list[int]:
    """The `checksum` of each tensor. The default chunk keeps products in a CPU's cache."""
    weights: dict[torch.device, Tensor] = {}
    sums = []
    for tensor in tensors:
        if tensor.device not in weights:  # weights are odd, so that no bit of an element is lost
            weights[tensor.device] = mixed(torch.arange(chunk, device=tensor.device)) | 1
        sums.append(_checksum(tensor, weights[tensor.device]))
    return [int(each) % 2**64 for each in sums]  # wait for the device only when all sums are launched


def _checksum(tensor: Tensor, weight: Tensor) -> Tensor:
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    words = {1: torch.int8, 2: torch.int16}.get(flat.element_size(), torch.int32)  # int64 products hold all bits
    flat = flat.contiguous().flatten().view(words)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for part in flat.split(len(weight)):
        total = total * FIRST + (part * weight[: len(part)]).sum()  # int64 wraps around
    return total


def _attributes(module: nn.Module) -> str:
    """The class of a module and its plain attributes, without a seed that only chose initial values."""
    left = {"training", "seed", "recompute"} if isinstance(module, Experts | LowRank) else {"training"}
    plain = {
        name: getattr(value, "__name__", type(value).__name__) if callable(value) else value
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name not in left and (callable(value) or _plain(value))
    }
    return f"{type(module).__name__}({', '.join(f'{name}={value!r}' for name, value in plain.items())})"


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | None) or (isinstance(value, tuple) and all(map(_plain, value)))


def _seeded(layer: MoE) -> list[Any]:
    return [module for module in layer.modules() if isinstance(module, Experts | LowRank)]
