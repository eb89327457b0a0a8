"""Sigmoid scores, balanced by a bias on the choice; groups of experts first, if there are any."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...dispatch.plan import load
from ..routing import Routing
from .base import Gate, normalised
from .router import route


class SigmoidGate(Gate):
    """The k experts of highest sigmoid(x W) + bias; the weight is without the bias (DeepSeek-V3, arXiv:2412.19437).

    The bias keeps loads even without an auxiliary loss (arXiv:2408.15664, algorithm 1): each training forward
    adds to `load`, and `update_bias`, once a step, moves the bias of every expert by `rate`, up where it got
    less than the mean, down where more. On many ranks call `balance_biases(model)`, which sums up loads.

    With groups, a token's experts come from `top_groups` of them: those whose k / top_groups best experts, with
    bias, have the largest sum. Group g is experts [g*E/G, (g+1)*E/G): G nodes make it "node-limited".

    Args:
        dim, num_experts, top_k: see `Gate`.
        rate: the bias's step; 0 leaves it as it is.
        normalize: divide the k weights by their sum.
        scale: multiplies the weights, after that ("routed scaling factor").
        groups, top_groups: G, a divisor of E, and how many of them a token may go to; None: all.
        balance_loss: let the layer add its balance loss, as the paper does with `balance="sequence"` and a
            weight of 1e-4.
    """

    bias: Tensor  # float32 [E], saved in checkpoints
    load: Tensor  # int64 [E], assignments since the last update

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        rate: float = 1e-3,
        normalize: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        top_groups: int | None = None,
        balance_loss: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, top_k)
        top_groups = groups if top_groups is None else top_groups
        if groups < 1 or num_experts % groups or not 1 <= top_groups <= groups:
            raise ValueError(
                f"groups={groups} must divide num_experts={num_experts}, and top_groups={top_groups} be one of 1 to it"
            )
        self.rate, self.normalize, self.scale = rate, normalize, scale
        self.groups, self.top_groups, self.balances_itself = groups, top_groups, not balance_loss
        self.register_buffer("bias", torch.zeros(num_experts))
        self.register_buffer("load", torch.zeros(num_experts, dtype=torch.int64), persistent=False)

    def reset_parameters(self) -> None:
        """Initialise the router as `nn.Linear` does, the bias with zeros."""
        super().reset_parameters()
        for buffer in self.buffers():
            nn.init.zeros_(buffer)

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [T, D]; scores are the sigmoids, without bias."""
        logits = self.logits(x)
        if self.top_groups == self.groups:
            expert, weight, scores = route(logits, self.top_k, "sigmoid", self.normalize, self.bias)
        else:
            scores = logits.sigmoid()
            expert = self._in_groups(scores.detach() + self.bias).topk(self.top_k).indices
            weight = scores.gather(1, expert)
            weight = normalised(weight) if self.normalize else weight
        return Routing(expert, weight * self.scale, scores, logits)

    def _in_groups(self, biased: Tensor) -> Tensor:
        """Biased scores [T, E], -inf where an expert's group is not among the best."""
        by_group, room = biased.unflatten(1, (self.groups, -1)), self.top_groups * self.num_experts // self.groups
        if self.top_k > room:
            raise ValueError(f"top_k={self.top_k}, but top_groups={self.top_groups} have only {room} experts")
        best = by_group.topk(max(self.top_k // self.top_groups, 1)).values.sum(-1)  # [T, G]
        chosen = torch.zeros_like(best).scatter(1, best.topk(self.top_groups).indices, 1.0) > 0
        return torch.where(chosen.unsqueeze(2), by_group, -torch.inf).flatten(1)

    @torch.no_grad()
    def observe(self, routing: Routing) -> None:
        """Count where tokens went."""
        self.load += load(routing.expert, self.num_experts)

    @torch.no_grad()
    def update_bias(self) -> None:
        """bias += rate * sign(mean load - load); the count starts again at 0."""
        self.bias += self.rate * (self.load.sum() - self.load * self.num_experts).sign()
        self.load.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SigmoidGate:
        """As in `nn.Module`, but ``.to(bfloat16)`` leaves the bias float32: a step would be lost in its rounding."""
        bias = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != bias.dtype and not self.bias.is_meta:
            self.bias = bias.to(self.bias.device)
        return self

    def extra_repr(self) -> str:
        """What print(model) shows."""
        groups = f", groups={self.groups}, top_groups={self.top_groups}" if self.groups > 1 else ""
        return f"{super().extra_repr()}, rate={self.rate}, scale={self.scale}{groups}"
