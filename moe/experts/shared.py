"""Shared experts, which every token visits beside its routed ones, and residual MoE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..gates.gate import projected
from .activation import ACTIVATIONS


class FeedForward(nn.Module):
    """Dense feed-forward block with an experts' activation: W_down act(W_up x), or W_down (act(W_gate x) * W_up x).

    As shared experts, n of hidden width H are one block of hidden width n H (DeepSeekMoE, arXiv:2401.06066).

    Args:
        dim: model width D.
        hidden: hidden width.
        activation: name in `ACTIVATIONS`; ``"swiglu"`` by default.
        bias: whether the layers have biases; False by default.
    """

    def __init__(self, dim: int, hidden: int, activation: str = "swiglu", bias: bool = False) -> None:
        super().__init__()
        self.activation = activation  # the name, because lambdas cannot be pickled
        self.up = nn.Linear(dim, hidden, bias)
        self.gate = nn.Linear(dim, hidden, bias) if ACTIVATIONS[activation].gated else None
        self.down = nn.Linear(hidden, dim, bias)

    @property
    def act(self) -> Callable[[Tensor], Tensor]:
        """The function that is applied to the gate projection, or without one to the up projection."""
        return ACTIVATIONS[self.activation].act.value

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.down(ACTIVATIONS[self.activation](self.up(x), None if self.gate is None else self.gate(x)))


@dataclass(frozen=True)
class Residual:
    """Residual MoE: each token weighs shared against routed experts, instead of adding them up.

    DeepSpeed implements residual MoE in this form. The paper's own form is a plain sum: ``shared=1`` with ``top_k=1``.

    Args:
        shared: number of shared experts, 1 or more, or a module [T, D] -> [T, D] that replaces them.

    References:
        PR-MoE: Rajbhandari et al. 2022, arXiv:2201.05596.

    >>> from turnout.moe import MoE
    >>> layer = MoE(dim=4, hidden=8, num_experts=2, top_k=1, shared=Residual(1))
    >>> layer(torch.randn(3, 4)).shape
    torch.Size([3, 4])
    """

    shared: int | nn.Module


class ResidualExperts(nn.Module):
    """Residual MoE of a layer: c_1 routed + c_2 branch(x), with (c_1, c_2) = softmax(W x + b) for each token.

    W [2, D] and b are learned. The softmax is computed in float32 or float64.

    Args:
        branch: module [T, D] -> [T, D] that every token visits.
        dim: model width D.
    """

    def __init__(self, branch: nn.Module, dim: int) -> None:
        super().__init__()
        self.branch, self.coefficient = branch, nn.Linear(dim, 2)

    def forward(self, x: Tensor, routed: Tensor) -> Tensor:
        """Combine the branch with the outputs of the routed experts: x [T, D], routed [T, D] -> [T, D]."""
        share = projected(x, self.coefficient.weight, self.coefficient.bias).softmax(-1)  # [T, 2]
        return (share[:, :1] * routed + share[:, 1:] * self.branch(x)).to(routed.dtype)


class Sum(nn.Module):
    """Shared experts made by a factory: the sum of their outputs for the same input."""

    def __init__(self, factory: Callable[[], nn.Module], number: int) -> None:
        super().__init__()
        self.each = nn.ModuleList(factory() for _ in range(number))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return torch.stack([module(x) for module in self.each]).sum(0)
