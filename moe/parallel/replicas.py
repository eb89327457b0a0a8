"""Whether ranks still hold the same values of what several of them keep: dense weights, routers, repeated experts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ...dispatch.agreement import told
from ..experts.sharded import local
from ..gates import Gate
from .alike import checksums, gathered, held_name


class ReplicaError(RuntimeError):
    """Ranks that keep the same weight hold different values of it; the message names weight and ranks."""


def check_replicas(model: nn.Module | Sequence[nn.Module], group: ProcessGroup | None = None) -> None:
    """Compare checksums of everything that more than one rank keeps, to the bit; call it on every rank of `group`.

    A bit that flips in the memory of one rank, or a gradient that was not summed over all ranks, raises no error: the
    replicas drift apart, and a checkpoint saves one of them. Call this every few hundred steps and before each save.
    It reads all weights once and exchanges 16 bytes a tensor. What a single rank keeps (FSDP and expert shards without
    a replica) has nothing to be compared with.

        if step % 200 == 0:
            check_replicas(model)

    Args:
        model: the module, or the stages of a pipeline that this rank runs. Parameters are compared by their names, and
            DTensors by the part that lies on a rank; of buffers those of routers.
        group: ranks to compare; None: all. A model on one rank without a process group always passes.

    Raises:
        ReplicaError: on every rank, with the tensor and, where a majority agrees, the rank that differs from it.
    """
    if not dist.is_initialized():
        return
    held = dict(_held([model] if isinstance(model, nn.Module) else model))
    keys = {_key(name): name for name in held}
    sums = dict(zip(keys, checksums(list(held.values())), strict=True))
    ranks = dist.get_process_group_ranks(group) if group else list(range(dist.get_world_size()))
    said: dict[int, dict[int, int]] = {}  # key: {rank: checksum}
    for rank, theirs in zip(ranks, gathered(list(sums.items()), group), strict=True):
        for key, value in theirs:
            said.setdefault(key, {})[rank] = value
    if differing := [key for key, values in said.items() if len(set(values.values())) > 1]:
        known = gathered({key: keys[key] for key in differing if key in keys}, group)
        names = {key: name for theirs in known for key, name in theirs.items()}
        more = f", and of {len(differing) - 1} more" if len(differing) > 1 else ""
        raise ReplicaError(f"{_apart(said[differing[0]], names[differing[0]], more)}. {REMEDY}")


REMEDY = (
    "Go back to the newest checkpoint. If it happens again on the same rank, its memory or device is failing; on other "
    "ranks, gradients are not summed over all of them: see turnout.moe.check"
)


def _apart(values: dict[int, int], name: str, more: str) -> str:
    """Who holds what, in words."""
    by_value: dict[int, list[int]] = {}
    for rank, value in values.items():
        by_value.setdefault(value, []).append(rank)
    most, *others = sorted(by_value.values(), key=len, reverse=True)
    if len(most) > sum(map(len, others)):
        odd = sorted(rank for each in others for rank in each)
        return f"{told(odd)} hold{'s' * (len(odd) == 1)} other values of {name}{more} than {told(most)}"
    return f"{' and '.join(map(told, by_value.values()))} hold different values of {name}{more}"


def _held(modules: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """What this rank keeps, by a name that says which part of the whole it is."""
    for part in modules:
        routers = [name for name, module in part.named_modules() if isinstance(module, Gate)]
        buffers = [(name, t) for name, t in part.named_buffers() if any(name.startswith(f"{r}.") for r in routers)]
        for name, tensor in [*part.named_parameters(), *buffers]:
            if (here := local(tensor.detach())).numel() and not here.is_meta:
                yield held_name(name, tensor), here


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
