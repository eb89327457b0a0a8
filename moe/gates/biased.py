"""A bias on the choice that follows the load: balance without a loss."""

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
    """A gate that chooses by score + bias, and keeps loads even with the bias (arXiv:2408.15664, algorithm 1).

    Each training forward adds to `load`; `update_bias`, once a step, moves the bias of every expert by `rate`, up
    where it got less than the mean, down where more. On many ranks call `update_expert_biases(model)`, which sums up
    loads first. A subclass uses `expert_bias` in its choice, and nowhere else.

    Args:
        dim, num_experts, top_k, scale, bias: see `Gate`.
        rate: the bias's step; 0 leaves it as it is.
    """

    balances_itself = True
    expert_bias: Tensor  # float32 [E], saved in checkpoints; not `bias`, the router's own, which is learned

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
        self._load = torch.zeros(num_experts, dtype=torch.int64)  # not a buffer: after `to_empty` it would be anything

    @property
    def load(self) -> Tensor:
        """int64 [E], on the gate's device: assignments since the last update; in no state dict."""
        device = self.expert_bias.device
        if self._load.device != device:
            self._load = torch.zeros_like(self._load, device=device) if self._load.is_meta else self._load.to(device)
        return self._load

    def reset_parameters(self) -> None:
        """Initialise the router as any `Gate` does, the bias of experts and the count with zeros."""
        super().reset_parameters()
        if hasattr(self, "expert_bias"):  # not yet in the constructor of `Gate`
            nn.init.zeros_(self.expert_bias)
            self.load.zero_()

    @torch.no_grad()
    def observe(self, routing: Routing) -> None:
        """Count where tokens went."""
        self.load.add_(load(routing.expert, self.num_experts))

    @torch.no_grad()
    def update_bias(self) -> None:
        """expert_bias += rate * sign(mean load - load); the count starts again at 0."""
        self.expert_bias += self.rate * (self.load.sum() - self.load * self.num_experts).sign()
        self.load.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BiasedGate:
        """As in `nn.Module`, but ``.to(bfloat16)`` leaves the bias float32: a step would be lost in its rounding."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if self.expert_bias.dtype != torch.float32:
            self.expert_bias = bias.to(self.expert_bias.device, torch.float32)
        if bias.is_meta and not self.expert_bias.is_meta:
            self.expert_bias.zero_()
        return self

    def _load_from_state_dict(self, *args: Any, **more: Any) -> None:
        """As in `nn.Module`, but ``assign=True`` takes no other dtype."""
        super()._load_from_state_dict(*args, **more)
        self.expert_bias = self.expert_bias.to(torch.float32)
