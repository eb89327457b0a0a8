"""`check_replicas`: compare weights that several ranks hold, such as dense weights, routers and replicated experts."""

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
    """Raised if ranks hold different values of the same weight. The message names the weight and the ranks."""


def check_replicas(model: nn.Module | Sequence[nn.Module], group: ProcessGroup | None = None) -> None:
    """Check that all weights which several ranks hold are equal to the bit. Call it on every rank of `group`.

    A flipped bit in the memory of one rank, or a gradient that was not summed over all ranks, raises no error. The
    replicas become different, and a checkpoint saves one of them. Call this every few hundred steps and before each
    save: ``if step % 200 == 0: check_replicas(model)``. It reads all weights once, and exchanges 16 bytes for each
    tensor. Shards that only one rank holds (FSDP, experts without a replica) cannot be compared.

    Args:
        model: module, or the stages of a pipeline that this rank runs. It compares all parameters, for a DTensor the
            part on each rank, and the buffers of routers.
        group: ranks to compare. None, the default, takes all ranks. Without a process group the check always passes.

    Raises:
        ReplicaError: values differ. Every rank raises, and the message names the tensor. If a majority of ranks agrees,
            it also names the ranks that differ.
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
    """The sentence of a `ReplicaError` that says which ranks hold different values."""
    by_value: dict[int, list[int]] = {}
    for rank, value in values.items():
        by_value.setdefault(value, []).append(rank)
    most, *others = sorted(by_value.values(), key=len, reverse=True)
    if len(most) > sum(map(len, others)):
        odd = sorted(rank for each in others for rank in each)
        return f"{told(odd)} hold{'s' * (len(odd) == 1)} other values of {name}{more} than {told(most)}"
    return f"{' and '.join(map(told, by_value.values()))} hold different values of {name}{more}"


def _held(modules: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Tensors on this rank to compare, with names that include the part of a sharded tensor."""
    for part in modules:
        routers = [name for name, module in part.named_modules() if isinstance(module, Gate)]
        buffers = [(name, t) for name, t in part.named_buffers() if any(name.startswith(f"{r}.") for r in routers)]
        for name, tensor in [*part.named_parameters(), *buffers]:
            if (here := local(tensor.detach())).numel() and not here.is_meta:
                yield held_name(name, tensor), here


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
