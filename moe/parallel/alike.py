"""Whether all ranks hold the same layers: options, shapes, values, and buffers that steer the routing."""

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
from ..build import called
from ..experts.base import Experts
from ..experts.low_rank import LowRank
from ..experts.sharded import held_slice, local
from ..gates.hash import FIRST, mixed
from ..layer import MoE

Notes = dict[str, str]  # what a rank says of its model, by what it speaks of; all of it should be alike
VALUES, SHOWN = "the values of ", 4


def agree(
    layers: dict[str, MoE], others: Notes, fault: Exception | None, group: ProcessGroup | None, when: str
) -> None:
    """Raise on every rank of a group unless all have the same layers, and no rank has a `fault`. One exchange.

    Experts of equal values may have been built under different seeds: they get those of the first rank, so that
    a later `reset_parameters` draws alike.

    Args:
        layers: by their names.
        others: what else must be alike.
        fault: what this rank refuses already; on other ranks a ValueError names it.
        group: the ranks; None: this one alone.
        when: until when weights should have been made equal, for the error.
    """
    if group is None:
        if fault is not None:
            raise fault
        return
    notes = others | {key: said for name, layer in layers.items() for key, said in described(name, layer)}
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
    """What every rank of a group says."""
    everyones: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, mine, group=group)
    return everyones


def differences(everyones: Sequence[Notes], ranks: Sequence[int], whole: bool = True) -> list[str]:
    """What ranks say differently of one thing, in words; where one says nothing of it that counts if `whole`."""
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
            found.append(f"{key} on {told(others)} are not those on {told(first)}")
        else:
            found.append(f"{key} is {', '.join(f'{what} on {told(where)}' for what, where in said.items())}")
    return found


def described(name: str, layer: MoE) -> Iterator[tuple[str, str]]:
    """What must be the same of one layer on all ranks: options, values, and the experts' seed if there are none yet."""
    yield from options(name, layer)
    yield from values(layer, behind=f" of {called(name)}")
    if any(t.is_meta for t in layer.experts.parameters()):
        yield f"the seed of the experts of {called(name)}", f"{layer.experts.seed}"


def options(name: str, layer: MoE) -> Iterator[tuple[str, str]]:
    """A layer's arguments, and those of its gate, experts and other parts."""
    for option in ("num_experts", "capacity", "balance", "parallelism", "shadow"):
        yield f"{option} of {called(name)}", repr(getattr(layer, option))
    yield f"experts.weight_on of {called(name)}", repr(layer.experts.weight_on)
    for own, module in layer.named_modules():
        if own:
            yield f"{own} of {called(name)}", _described(module)


def values(
    module: nn.Module, kinds: Sequence[str] = ("parameter", "buffer"), behind: str = ""
) -> Iterator[tuple[str, str]]:
    """Shape and checksum of each parameter and buffer of a module, of one that is split for the part that lies here."""
    for kind in kinds:
        for own, t in module.named_parameters() if kind == "parameter" else module.named_buffers():
            yield f"{kind} {own}{behind}", f"{tuple(t.shape)} {t.dtype}"
            if not t.is_meta:
                yield f"{VALUES}{kind} {held_name(own, t)}{behind}", f"{checksum(local(t.detach())):x}"


def held_name(name: str, tensor: Tensor) -> str:
    """A tensor's name and, of one that is split, the part that lies here: "w_up[2:4, 0:8]"."""
    parts = ", ".join(f"{part.start}:{part.stop}" for part in held_slice(tensor))
    return f"{name}[{parts}]" if isinstance(tensor, DTensor) else name


def checksum(tensor: Tensor, chunk: int = 1 << 20) -> int:
    """A number made of a tensor's bits and their order; one element that differs always changes it.

    >>> checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([2.0, 1.0]))
    False
    """
    return checksums([tensor], chunk)[0]


@torch.no_grad()
def checksums(tensors: Sequence[Tensor], chunk: int = 1 << 16) -> list[int]:
    """The `checksum` of each tensor. Chunks are such that their products stay in a CPU's cache."""
    weights: dict[torch.device, Tensor] = {}
    sums = []
    for tensor in tensors:
        if tensor.device not in weights:  # odd, so that no bit of an element is lost
            weights[tensor.device] = mixed(torch.arange(chunk, device=tensor.device)) | 1
        sums.append(_checksum(tensor, weights[tensor.device]))
    return [int(each) % 2**64 for each in sums]  # all are under way before the first is waited for


def _checksum(tensor: Tensor, weight: Tensor) -> Tensor:
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    words = {1: torch.int8, 2: torch.int16}.get(flat.element_size(), torch.int32)  # room above, for the products
    flat = flat.contiguous().flatten().view(words)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for part in flat.split(len(weight)):
        total = total * FIRST + (part * weight[: len(part)]).sum()  # int64 wraps around
    return total


def _described(module: nn.Module) -> str:
    """Its class, and what numbers and names it was built with; not a seed by which it only was initialised."""
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
