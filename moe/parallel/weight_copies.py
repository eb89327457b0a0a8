"""Copies of experts' tensors on other ranks, and experts that compute with them; differentiable."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ...dispatch.collectives import all_to_all_start
from ...dispatch.place import Visit
from ..experts.base import Experts

Tensors = dict[str, Tensor]  # by the names of parameters and buffers


def copy_to(tensors: Tensors, to: list[bool], recv: list[int], group: ProcessGroup, visit: Visit | None) -> Tensors:
    """Each tensor [n, ...] to the ranks of a group named by `to`; what comes from all of them, in the order of ranks.

    The backward sends gradients home, where autograd adds them up in the order of the ranks, in float32 or wider. It is
    an all-to-all and a sum in place of a reduce-scatter, whose order depends on the backend.
    """
    rows = len(next(iter(tensors.values())))
    copies = {name: t.expand(sum(to), *t.shape).flatten(0, 1) for name, t in tensors.items()}
    return _exchange(copies, [rows if reached else 0 for reached in to], recv, group, visit)


def copy_in_pieces(tensors: Tensors, recv: list[int], group: ProcessGroup, visit: Visit | None) -> Tensors:
    """As `copy_to` to all ranks, where few of them have much to send: they hand out pieces, which all ranks then copy.

    So a rank sends what it has once, not W - 1 times, and its share of everything W - 1 times.
    """
    ranks, pieces = dist.get_world_size(group), {}
    for name, t in tensors.items():
        flat = t.flatten(1) if t.ndim > 1 else t.unsqueeze(1)
        flat = nn.functional.pad(flat, (0, -flat.shape[1] % ranks))
        pieces[name] = rearrange(flat, "n (w p) -> (w n) p", w=ranks)
    mine = _exchange(pieces, [len(next(iter(tensors.values())))] * ranks, recv, group, visit)
    whole = {}
    for name, t in copy_to(mine, [True] * ranks, [sum(recv)] * ranks, group, visit).items():
        shape = tensors[name].shape[1:]
        whole[name] = rearrange(t, "(w n) p -> n (w p)", w=ranks)[:, : shape.numel()].reshape(-1, *shape)
    return whole


def _exchange(tensors: Tensors, send: list[int], recv: list[int], group: ProcessGroup, visit: Visit | None) -> Tensors:
    came: Tensors = {}
    for learns in (True, False):  # gradients of frozen tensors need not travel
        some = {name: t for name, t in tensors.items() if t.requires_grad == learns}
        if some:
            arrived = all_to_all_start(*some.values(), send=send, recv=recv, group=group, visit=visit).wait()
            came |= dict(zip(some, arrived, strict=True))
    return came


def computing_with(experts: Experts, tensors: Tensors) -> Experts:
    """A shallow copy that computes with other tensors, by name, in place of its parameters and buffers.

    `functional_call` would put the old ones back before a backward that computes activations again.
    """

    def twin(module: nn.Module, prefix: str) -> Any:
        made = object.__new__(type(module))
        made.__dict__ = vars(module) | {
            "_parameters": {name: tensors.get(prefix + name, p) for name, p in module._parameters.items()},
            "_buffers": {name: tensors.get(prefix + name, b) for name, b in module._buffers.items()},
            "_modules": {
                name: None if m is None else twin(m, f"{prefix}{name}.") for name, m in module._modules.items()
            },
            "_compiled_call_impl": None,  # it would call the module itself
        }
        return made

    return twin(experts, "")
