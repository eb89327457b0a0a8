"""Loss scaling for float16 whose overflows all ranks hear of."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ...dispatch.torch_internals import unscale
from ..experts.sharded import local


class GradScaler(torch.amp.GradScaler):
    """torch's GradScaler (arXiv:1710.03740) for models on many ranks: an overflow anywhere skips the step everywhere.

    A rank sees infinities in its own experts' and its own stage's gradients alone; if it left out a step by itself,
    the others would go on without it. Gradients may be plain tensors and DTensors of any mesh, mixed.
    Call ``scale(loss).backward()``, `sync_gradients`, ``unscale_(optimizer)``, `clip_grad_norm_`,
    ``step(optimizer)`` and ``update()``, in this order, on every rank.

    Args:
        device: "cuda" or "cpu".
        group: ranks that step together; None: all.
        options: those of `torch.amp.GradScaler`: init_scale, growth_factor, backoff_factor, growth_interval, enabled.
    """

    def __init__(self, device: str = "cuda", group: ProcessGroup | None = None, **options: Any) -> None:
        super().__init__(device, **options)
        self.group = group

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        grads: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    grad = p.grad._values() if p.grad.is_sparse else local(p.grad)
                    if grad.dtype == torch.float16 and not allow_fp16:
                        raise ValueError("gradients are float16: keep parameters in float32, and use torch.autocast")
                    grads[grad.device, grad.dtype].append(grad)
        for (device, _), same in grads.items():
            found = torch.zeros_like(found_inf, device=device)
            unscale(same, found, inv_scale.to(device))
            found_inf.copy_(torch.maximum(found_inf, found.to(found_inf.device)))
        if dist.is_initialized():
            dist.all_reduce(found_inf, dist.ReduceOp.MAX, group=self.group)
        return {found_inf.device: found_inf}
