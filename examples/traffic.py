"""Counter of the bytes that a rank sends, by axis of the mesh and kind of collective."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from turnout.dispatch import Meshes
from turnout.dispatch import mesh as axes

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
OUT = -1  # index that stands for the operation's result
# operation: (kind, and indices of its arguments: the whole tensor of all ranks, the group, the rows for each rank)
OPERATIONS = {
    "c10d::allreduce_": ("all_reduce", 0, 1, None),
    "c10d::allreduce_coalesced_": ("all_reduce", 0, 1, None),
    "c10d::allgather_": ("all_gather", 0, 2, None),
    "c10d::allgather_coalesced_": ("all_gather", 0, 2, None),
    "c10d::_allgather_base_": ("all_gather", 0, 2, None),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", 0, 2, None),
    "c10d::reduce_scatter_": ("reduce_scatter", 1, 2, None),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1, 2, None),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1, 2, None),
    "c10d::alltoall_": ("all_to_all", 1, 2, None),
    "c10d::alltoall_base_": ("all_to_all", 1, 2, 4),
    "c10d::send": ("send", 0, 1, None),
    "_c10d_functional::all_reduce": ("all_reduce", 0, 2, None),
    "_c10d_functional::all_reduce_": ("all_reduce", 0, 2, None),
    "_c10d_functional::all_reduce_coalesced": ("all_reduce", 0, 2, None),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", OUT, 2, None),
    "_c10d_functional::all_gather_into_tensor_coalesced": ("all_gather", OUT, 2, None),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0, 3, None),
    "_c10d_functional::reduce_scatter_tensor_coalesced": ("reduce_scatter", 0, 3, None),
    "_c10d_functional::all_to_all_single": ("all_to_all", 0, 3, 2),
    "_dtensor::shard_dim_alltoall": ("all_to_all", 0, 3, None),
}


class Traffic(TorchDispatchMode):
    """Context that counts the bytes that this rank sends, in `sent` by (axis, kind of collective).

    It sees each collective of torch.distributed, DTensor, FSDP2 and pipelines, in forward and backward. It assumes
    ring algorithms, whatever the backend uses. With n bytes on W ranks, all-gather, reduce-scatter and an even
    all-to-all send (W - 1) / W n, and an all-reduce twice that. An uneven all-to-all counts the rows for other ranks.
    Each operation passes through Python, so enter it for single steps.
    """

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        self.names = names  # name of a group: its axes, from `axes_of`
        self.sent: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor runs it as operations on plain tensors, which come here again
        out = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0] if hasattr(func, "_schema") else ""
        if name in OPERATIONS:
            kind, whole, group, rows = OPERATIONS[name]
            self._count(kind, out if whole == OUT else args[whole], args[group], args[rows] if rows else None)
        return out

    def _count(self, kind: str, whole: Any, group: Any, rows: list[int] | None) -> None:
        if isinstance(group, str):
            group = dist.distributed_c10d._resolve_process_group(group)
        elif not isinstance(group, ProcessGroup):
            group = ProcessGroup.unbox(group)
        size = _bytes(whole)
        if kind == "all_to_all" and rows:
            size *= 1 - rows[group.rank()] / max(1, sum(rows))
        elif kind != "send":
            size *= (group.size() - 1) / group.size() * (2 if kind == "all_reduce" else 1)
        axis = self.names.get(group.group_name, "other")
        if kind == "send" and axes.PP not in axis.split("="):  # gloo's all-to-all of gradients is single messages
            kind = "all_to_all"
        self.sent[axis, kind] += round(size)


def axes_of(meshes: Meshes) -> dict[str, str]:
    """Name of each group: its axis. Axes with the same ranks share a group, and so a name such as "dp=ep"."""
    names: dict[str, str] = {}
    for mesh in (meshes.dense, meshes.experts):
        for axis in mesh.mesh_dim_names or ():
            group = mesh[axis].get_group()
            if group.size() > 1:
                known = names[group.group_name].split("=") if group.group_name in names else []
                names[group.group_name] = "=".join(dict.fromkeys([*known, axis]))
    if (ep := axes.axis(meshes.experts, axes.EP)) is not None and ep.size() > 1:
        names.setdefault(ep.get_group().group_name, axes.EP)  # the group of "node" and "local" together
    for mesh, joined in (
        (meshes.tokens, (axes.DP, axes.CP, axes.TP)),
        (meshes.sequences, (axes.CP, axes.TP)),
        (meshes.replicas, (axes.DP, axes.CP)),
    ):
        split = [axis for axis in joined if meshes.dense[axis].size() > 1]
        names.setdefault(mesh.get_group().group_name, "_".join(split))
    names.setdefault(dist.group.WORLD.group_name, "all")  # pyright: ignore[reportOptionalMemberAccess]
    return names


def _bytes(tensors: Any) -> float:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))
