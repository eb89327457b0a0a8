"""Copies of experts' tensors on other ranks, and experts that compute with these copies. All is differentiable."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from ...dispatch.collectives import all_to_all_start
from ...dispatch.dispatcher import Experts as Compute
from ...dispatch.place import LayerCall
from ..experts.base import Experts

Tensors = dict[str, Tensor]  # by the names of parameters and buffers


def copy_to(tensors: Tensors, to: list[bool], recv: list[int], group: ProcessGroup, call: LayerCall | None) -> Tensors:
    """Send copies of tensors to other ranks of a group, and receive theirs.

    The backward sends gradients back, where autograd adds them up in the order of the ranks, in float32 or wider. It is
    an all-to-all and a sum, because the order of a reduce-scatter depends on the backend.

    Args:
        tensors: tensors [n, ...] by name.
        to: whether each rank gets a copy, in the order of ranks.
        recv: number of entries on axis 0 that come from each rank.
        group: the ranks.
        call: the forward that the exchange belongs to.

    Returns:
        The received tensors by name, in the order of ranks.
    """
    rows = len(next(iter(tensors.values())))
    copies = {name: t.expand(sum(to), *t.shape).flatten(0, 1) for name, t in tensors.items()}
    return _exchange(copies, [rows if reached else 0 for reached in to], recv, group, call)


def copy_in_pieces(tensors: Tensors, recv: list[int], group: ProcessGroup, call: LayerCall | None) -> Tensors:
    """`copy_to` all ranks, for when few ranks have most of the tensors.

    Each rank first spreads pieces of its tensors over all ranks, and then all ranks copy their pieces to all others. So
    a rank sends its own tensors once, and not W - 1 times.
    """
    ranks, pieces = dist.get_world_size(group), {}
    for name, t in tensors.items():
        flat = t.flatten(1) if t.ndim > 1 else t.unsqueeze(1)
        flat = nn.functional.pad(flat, (0, -flat.shape[1] % ranks))
        pieces[name] = rearrange(flat, "n (w p) -> (w n) p", w=ranks)
    mine = _exchange(pieces, [len(next(iter(tensors.values())))] * ranks, recv, group, call)
    whole = {}
    for name, t in copy_to(mine, [True] * ranks, [sum(recv)] * ranks, group, call).items():
        shape = tensors[name].shape[1:]
        whole[name] = rearrange(t, "(w n) p -> n (w p)", w=ranks)[:, : shape.numel()].reshape(-1, *shape)
    return whole


def _exchange(
    tensors: Tensors, send: list[int], recv: list[int], group: ProcessGroup, call: LayerCall | None
) -> Tensors:
    came: Tensors = {}
    for learns in (True, False):  # gradients of frozen tensors need not travel
        some = {name: t for name, t in tensors.items() if t.requires_grad == learns}
        if some:
            arrived = all_to_all_start(*some.values(), send=send, recv=recv, group=group, call=call).wait()
            came |= dict(zip(some, arrived, strict=True))
    return came


def with_copies(experts: Experts, gather: Callable[[], Tensors]) -> Compute:
    """A function that computes the experts with the tensors that `gather` returns, in place of their own.

    `gather` runs now, once. With FSDP2 it runs in each call instead, inside `experts.forward`: only there FSDP2 has
    gathered its own shards, and it reduces gradients after the backward of `experts.forward`.
    """
    if not isinstance(experts, FSDPModule):
        return _twin(experts, gather())

    def forward(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        twin = _twin(experts, gather())
        return _check_buffers(twin, (rows, weight, counts), twin.forward(rows, weight, counts))

    def compute(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        before = {name: vars(experts)[name] for name in ("forward", "recompute") if name in vars(experts)}
        vars(experts).update(forward=forward, recompute=False)
        try:
            return experts(rows, weight, counts)
        finally:
            del vars(experts)["forward"], vars(experts)["recompute"]
            vars(experts).update(before)

    def recomputed(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        return checkpoint(compute, rows, weight, counts, use_reentrant=False)  # pyright: ignore[reportReturnType]

    return recomputed if experts.recompute and torch.is_grad_enabled() else compute


def _twin(experts: Experts, tensors: Tensors) -> Experts:
    """A shallow copy that computes with other tensors, by name, in place of its parameters and buffers.

    `functional_call` would put the old ones back before a backward that computes activations again.
    """

    def twin(module: nn.Module, prefix: str) -> Any:
        made = object.__new__(type(module))
        made.__dict__ = vars(module) | {
            "_parameters": {name: tensors.get(prefix + name, p) for name, p in module._parameters.items()},
            "_buffers": {name: tensors.get(prefix + name, b) for name, b in module._buffers.items()},
            "_modules": {n: None if m is None else twin(m, f"{prefix}{n}.") for n, m in module._modules.items()},
            "_compiled_call_impl": None,  # it would call the module itself
        }
        return made

    copied = twin(experts, "")
    vars(copied).pop("forward", None)  # of `with_copies`
    copied._forward_hooks = OrderedDict(experts._forward_hooks)
    copied.register_forward_hook(_check_buffers)
    vars(copied)["versions"] = [buffer._version for buffer in copied.buffers()]
    return copied


def _check_buffers(copied: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
    """Forward hook of copies. It raises ValueError if a buffer has changed, because the change would be lost."""
    if vars(copied)["versions"] != [buffer._version for buffer in copied.buffers()]:
        raise ValueError(
            "experts change their buffers in a forward, and the change of a copy would be lost: leave parallelism and "
            "shadow as parallelize sets them"
        )
    return y
