"""Activation offload: activations wait for their backward in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..moe.experts.sharded import local


@contextmanager
def activations_on_cpu(model: nn.Module) -> Iterator[None]:
    """Context that keeps activations in host memory until the backward needs them; run a model's steps inside.

    Tensors from a GPU go to pinned memory. Weights stay where they are, with their views and what FSDP2 has gathered
    of them. `torch.autograd.graph.save_on_cpu` would move them as well. Casts of weights that autocast makes do move.

    Args:
        model: model whose weights stay.
    """
    weights: set[int] = set()

    def note(module: nn.Module, *_: Any) -> None:
        weights.update(_storage(p) for p in module.parameters())

    def keep(x: Tensor) -> Tensor | _Away:
        return x.detach() if _storage(x) in weights else _Away.of(x)

    note(model)
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    hooks = [module.register_forward_pre_hook(note) for module in sharded]  # after FSDP2's own hooks, which gather
    try:
        with saved_tensors_hooks(keep, lambda kept: kept.back() if isinstance(kept, _Away) else kept):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Away(NamedTuple):
    """Saved tensor whose elements are in host memory."""

    host: Tensor
    device: torch.device
    spread: dict[str, Any] | None  # arguments that make a DTensor of it again; None for a plain tensor

    @classmethod
    def of(cls, x: Tensor) -> _Away:
        spread = None
        if isinstance(x, DTensor):
            spread = {"device_mesh": x.device_mesh, "placements": x.placements, "shape": x.shape, "stride": x.stride()}
        return cls(to_host(local(x)), x.device, spread)

    @torch.no_grad()
    def back(self) -> Tensor:
        held = self.host.to(self.device, non_blocking=True)
        return held if self.spread is None else DTensor.from_local(held, **self.spread, run_check=False)


@torch.no_grad()
def to_host(x: Tensor) -> Tensor:
    """Copy of a tensor in host memory, pinned if it comes from a GPU."""
    return torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x)


def _storage(x: Tensor) -> int:
    return local(x).untyped_storage()._cdata
