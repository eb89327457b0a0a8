"""Zero-computation (free) experts: they cost almost nothing, and their tokens are not dispatched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..gates.gate import projected, uniform

KINDS = ("null", "identity", "constant")


class FreeExperts(nn.Module):
    """Zero-computation experts, which every rank has and the gate may choose like any other expert.

    ``"null"`` returns 0. ``"identity"`` returns x. ``"constant"`` returns a_1 x + a_2 v with a learned vector v and
    (a_1, a_2) = softmax(W_c x). Their ids follow the ids of the routed experts.

    Args:
        kinds: kind of each free expert, in order.
        dim: model width D.

    Raises:
        ValueError: `kinds` is a string or has an unknown kind.

    References:
        MoE++: Jin et al. 2024, arXiv:2410.07348, section 3.1.
    """

    def __init__(self, kinds: Sequence[str], dim: int) -> None:
        super().__init__()
        if isinstance(kinds, str) or not set(kinds) <= set(KINDS):
            raise ValueError(f"free must be a list of kinds, each one of {', '.join(KINDS)}; got {kinds!r}")
        self.kinds, self.dim = tuple(kinds), dim
        constants = self.kinds.count("constant")
        self.constant = nn.Parameter(torch.empty(constants, dim)) if constants else None
        self.mix = nn.Parameter(torch.empty(constants, 2, dim)) if constants else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise vectors and mixing matrices with a uniform distribution within 1 / sqrt(D)."""
        for p in self.parameters():
            uniform(p.flatten(0, -2))

    def __len__(self) -> int:
        return len(self.kinds)

    def forward(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        """Weighted sum of each token's free experts: x [T, D], weight [T, k] -> [T, D].

        `expert` is int64 [T, k]: 0 is the first free expert, and all other choices are negative.
        """
        share = weight.new_zeros(len(x), len(self) + 1).scatter_add(  # the last column takes all other choices
            1, torch.where(expert < 0, len(self), expert), torch.where(expert < 0, 0, weight)
        )
        kept = sum((share[:, i : i + 1] for i in self._of("identity")), torch.zeros_like(share[:, :1]))
        if self.constant is None or self.mix is None:
            return (kept * x).to(x.dtype)
        mine = torch.stack([share[:, i] for i in self._of("constant")], 1).unsqueeze(2)  # [T, C, 1]
        a = projected(x, self.mix.flatten(0, 1)).unflatten(1, (-1, 2)).softmax(-1)  # [T, C, 2]
        to_x, to_v = (mine * a).unbind(2)
        return ((kept + to_x.sum(1, keepdim=True)) * x + to_v @ self.constant.to(to_v.dtype)).to(x.dtype)

    def _of(self, kind: str) -> list[int]:
        return [i for i, own in enumerate(self.kinds) if own == kind]

    def extra_repr(self) -> str:
        """Text that ``print(model)`` shows."""
        return ", ".join(self.kinds)
