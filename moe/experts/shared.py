"""Experts that every token visits, beside the routed ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..gates.gate import projected
from .activation import ACTIVATIONS


class FeedForward(nn.Module):
    """A dense perceptron of the experts' kind: W_down act(W_up x), or W_down (act(W_gate x) * W_up x).

    x [..., D] -> [..., D]. n shared experts of width H are one of width n*H (DeepSeekMoE,
    arXiv:2401.06066).
    """

    def __init__(self, dim: int, hidden: int, activation: str = "swiglu", bias: bool = False) -> None:
        super().__init__()
        self.activation = activation  # its name: a pickle has no lambdas
        self.up = nn.Linear(dim, hidden, bias)
        self.gate = nn.Linear(dim, hidden, bias) if ACTIVATIONS[activation].gated else None
        self.down = nn.Linear(hidden, dim, bias)

    @property
    def act(self) -> Callable[[Tensor], Tensor]:
        """What is applied to `up`, or if there is a gate to `gate`."""
        return ACTIVATIONS[self.activation].act.value

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.down(ACTIVATIONS[self.activation](self.up(x), None if self.gate is None else self.gate(x)))


@dataclass(frozen=True)
class Residual:
    """Weighs shared experts against the routed ones, token by token, in place of adding them: ``shared=Residual(1)``.

    This is the form that DeepSpeed gives to residual MoE (PR-MoE, Rajbhandari et al., arXiv:2201.05596). Plain
    ``shared=1`` with ``top_k=1`` is the paper's own, a sum. The layer makes a `ResidualExperts` of it.

    Args:
        shared: number of shared experts, 1 or more, or a module [T, D] -> [T, D] that stands for them.
    """

    shared: int | nn.Module


class ResidualExperts(nn.Module):
    """A dense branch weighed against the routed experts: c_1 routed + c_2 branch(x).

    (c_1, c_2) = softmax(W x + b) with learned W [2, D] and b, computed in float32 or wider.

    Args:
        branch: [T, D] -> [T, D].
        dim: model width D.
    """

    def __init__(self, branch: nn.Module, dim: int) -> None:
        super().__init__()
        self.branch, self.coefficient = branch, nn.Linear(dim, 2)

    def forward(self, x: Tensor, routed: Tensor) -> Tensor:
        """Tokens x [T, D] and what their experts made of them, [T, D] -> [T, D]."""
        share = projected(x, self.coefficient.weight, self.coefficient.bias).softmax(-1)  # [T, 2]
        return (share[:, :1] * routed + share[:, 1:] * self.branch(x)).to(routed.dtype)


class Sum(nn.Module):
    """The sum of modules that all see the same input: shared experts built by a factory."""

    def __init__(self, factory: Callable[[], nn.Module], number: int) -> None:
        super().__init__()
        self.each = nn.ModuleList(factory() for _ in range(number))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return torch.stack([module(x) for module in self.each]).sum(0)
