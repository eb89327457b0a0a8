"""Loss-free balancing: a bias for each expert, added to its score for the choice alone, that follows the load."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...dispatch.plan import load
from ..routing import Routing
from .gate import Gate


class BiasedGate(Gate, ABC):
    """Base class of gates that choose by score + `expert_bias` and balance the load with that bias.

    Each training forward adds to `load`. Once a step, `update_bias` moves the bias of each expert by `rate`: up if it
    got fewer tokens than the mean, down if more. On many ranks call `update_expert_biases(model)`, which first sums
    loads over ranks. A subclass uses `expert_bias` for the choice, and not for scores or weights.

    Args:
        dim, num_experts, top_k, scale, bias: see `Gate`; `top_k` is 2 by default.
        rate: step size of the expert bias; 1e-3 by default, 0 keeps the bias as it is.

    References:
        Loss-free balancing: Wang et al. 2024, arXiv:2408.15664, algorithm 1.
    """

    balances_itself = True
    expert_bias: Tensor  # float32 [E], saved in checkpoints. It is not `bias`, the learned bias of the logits.

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        rate: float = 1e-3,
        scale: float = 1.0,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, top_k, scale, bias)
        self.rate = rate
        self.register_buffer("expert_bias", torch.zeros(num_experts, dtype=torch.float32))
        self._load = torch.zeros(num_experts, dtype=torch.int64)  # not a buffer: `to_empty` would leave it undefined

    @property
    def load(self) -> Tensor:
        """Assignments to each expert since the last update: int64 [E] on the gate's device, in no state dict."""
        device = self.expert_bias.device
        if self._load.device != device:
            self._load = torch.zeros_like(self._load, device=device) if self._load.is_meta else self._load.to(device)
        return self._load

    def reset_parameters(self) -> None:
        """Initialise the router as `Gate` does, and set expert bias and load to zero."""
        super().reset_parameters()
        if hasattr(self, "expert_bias"):  # the constructor of `Gate` calls this before it exists
            nn.init.zeros_(self.expert_bias)
            self.load.zero_()

    @torch.no_grad()
    def observe(self, routing: Routing) -> None:
        """Add the assignments of one training forward to `load`."""
        self.load.add_(load(routing.expert, self.num_experts))

    @torch.no_grad()
    def update_bias(self) -> None:
        """Add rate * sign(mean load - load) to `expert_bias`, and set `load` to zero."""
        self.expert_bias += self.rate * (self.load.sum() - self.load * self.num_experts).sign()
        self.load.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BiasedGate:
        """As in `nn.Module`, but the expert bias stays float32: bfloat16 would round its steps away."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if self.expert_bias.dtype != torch.float32:
            self.expert_bias = bias.to(self.expert_bias.device, torch.float32)
        if bias.is_meta and not self.expert_bias.is_meta:
            self.expert_bias.zero_()
        return self

    def _load_from_state_dict(self, *args: Any, **more: Any) -> None:
        """As in `nn.Module`, but the expert bias stays float32 with ``assign=True``, too."""
        super()._load_from_state_dict(*args, **more)
        self.expert_bias = self.expert_bias.to(torch.float32)
