"""`GradScaler`: float16 loss scaling in which all ranks skip the same steps."""

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
    """`torch.amp.GradScaler` for many ranks: if gradients overflow on any rank, all ranks skip the step.

    A rank only sees infinities in the gradients of its own experts and its own pipeline stage. If it skipped a step
    alone, ranks would differ from then on. Gradients may be a mix of plain tensors and DTensors of any mesh. On every
    rank, call ``scale(loss).backward()``, `sync_gradients`, ``unscale_(optimizer)``, `clip_grad_norm_`,
    ``step(optimizer)`` and ``update()``, in this order. ``ParallelModel.step(tokens, targets, scaler.get_scale())``
    takes the place of the first two.

    Args:
        device: device type, ``"cuda"`` (the default) or ``"cpu"``.
        group: ranks that step together. None, the default, takes all ranks.
        options: further arguments of `torch.amp.GradScaler`: init_scale, growth_factor, backoff_factor,
            growth_interval and enabled.

    Raises:
        ValueError: gradients are float16, in ``unscale_`` and ``step``. Parameters must be float32.

    References:
        Mixed precision training: Micikevicius et al. 2017, arXiv:1710.03740.
    """

    def __init__(self, device: str = "cuda", group: ProcessGroup | None = None, **options: Any) -> None:
        super().__init__(device, **options)
        self.group = group

    def get_scale(self) -> float:
        """The factor by which losses are scaled now, 1.0 without float16."""
        if self.is_enabled() and self._scale is None:  # torch makes it in `scale`, which a factor does not need
            self.scale(torch.ones((), device=self._device))
        return super().get_scale()

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        grads: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    grad = p.grad._values() if p.grad.is_sparse else local(p.grad)
                    if grad.dtype == torch.float16 and not allow_fp16:
                        raise ValueError(
                            f"a gradient of shape {tuple(grad.shape)} is float16: keep parameters in float32, and use "
                            "torch.autocast"
                        )
                    grads[grad.device, grad.dtype].append(grad)
        for (device, _), same in grads.items():
            found = torch.zeros_like(found_inf, device=device)
            unscale(same, found, inv_scale.to(device))
            found_inf.copy_(torch.maximum(found_inf, found.to(found_inf.device)))
        if dist.is_initialized():
            dist.all_reduce(found_inf, dist.ReduceOp.MAX, group=self.group)
        return {found_inf.device: found_inf}
