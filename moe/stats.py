"""Load statistics: tokens per expert, dropped tokens, imbalance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch.plan import load
from ..dispatch.torch_internals import transformed


@dataclass(frozen=True)
class Load:
    """How many tokens each expert got, counted before capacity drops any and without padding.

    Attributes:
        tokens_per_expert: assignments to each expert, int64 [E]. Free experts follow the routed ones.
        dropped: share of all assignments that capacity dropped, 0 to 1; a scalar.
        entropy: entropy of the load divided by log E, a scalar. 1 is even. If all tokens visit the same k experts, it
            is log k / log E.
        imbalance: largest load over the mean load, a scalar. 1 is even. If all tokens visit the same k experts, it is
            E / k.
    """

    tokens_per_expert: Tensor
    dropped: Tensor
    entropy: Tensor
    imbalance: Tensor


@dataclass(frozen=True)
class Stats(Load):
    """Load of one forward on this rank, as tensors on the layer's device. Reading one waits for the device.

    `turnout.moe.load` gives the load of all ranks over many forwards.

    Attributes:
        tokens_per_expert, dropped, entropy, imbalance: see `Load`.
        nonfinite: whether a weight of the gate is NaN or infinite; a bool scalar.

    >>> chosen = torch.tensor([[0], [0], [1], [0]])
    >>> stats = Stats.of(chosen, chosen, torch.ones(4, 1), num_experts=2)
    >>> stats.tokens_per_expert.tolist(), stats.imbalance.item()
    ([3, 1], 1.5)
    """

    nonfinite: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, chosen: Tensor, kept: Tensor, weight: Tensor, num_experts: int) -> Stats:
        """Statistics of one routing, without a host sync.

        Args:
            chosen: expert ids before capacity, int64 [T, k].
            kept: expert ids after capacity, int64 [T, k], -1 where dropped.
            weight: weights [T, k].
            num_experts: number of experts E.
        """
        tokens = load(chosen, num_experts)
        return cls(*measured(tokens, tokens.sum() - (kept >= 0).sum()), nonfinite=~weight.isfinite().all())


def measured(
    tokens: Tensor, dropped: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fields of a `Load`, from the tokens of each expert, int64 [E], and the number of dropped assignments."""
    total, E = tokens.sum().clamp(min=1).to(dtype), len(tokens)
    share = tokens / total
    return tokens, dropped / total, torch.special.entr(share).sum() / math.log(max(E, 2)), share.max() * E


class LoadCount:
    """A layer's load, summed on the device over its forwards until `turnout.moe.load` takes it.

    `total` is of all forwards, whoever took what, so that `Adaptive` and `load` do not disturb each other. It is not a
    buffer: DDP would overwrite it with rank 0's count, and `to_empty` would leave it uninitialised.
    """

    def __init__(self, num_experts: int) -> None:
        # unused choices (-1), assignments to each expert, assignments that capacity dropped, forwards
        self.sums = torch.zeros(1 + num_experts + 2, dtype=torch.int64)
        self.taken: Tensor | None = None  # sums of what has been taken

    @torch.no_grad()
    def add(self, chosen: Tensor, dropped: Tensor | None, num_experts: int) -> None:
        """Count one forward: expert ids `chosen`, int64 [T, k]; `dropped`, bool [T, k], or None if none was dropped."""
        if transformed():
            return  # a function under `torch.func` may not change tensors that are not its arguments
        if len(self.sums) != num_experts + 3:  # the number of choices has changed: start again
            self.sums, self.taken = LoadCount(num_experts).sums, None
        if self.sums.device != chosen.device:
            self.move_to(chosen.device)
        ids = chosen.flatten() + 1
        self.sums.scatter_add_(0, ids, torch.ones_like(ids))
        self.sums[-1].add_(1)
        if dropped is not None:
            self.sums[-2].add_(dropped.sum())

    def __reduce__(self) -> tuple[type[LoadCount], tuple[int]]:
        return LoadCount, (len(self.sums) - 3,)  # a copy starts at zero

    def take(self) -> Tensor:
        """Tokens of each expert, then the number of dropped ones, since the last call: int64 [E + 1]."""
        taken = self.sums[1:-1].clone()
        self.taken = self.total()
        self.sums.zero_()
        return taken

    def total(self) -> Tensor:
        """Tokens of each expert, the number of dropped ones, and of forwards, of all forwards: int64 [E + 2]."""
        return self.sums[1:].clone() if self.taken is None else self.taken.to(self.sums.device) + self.sums[1:]

    def move_to(self, device: torch.device) -> None:
        """Move to another device. From the meta device, which holds no values, it starts at zero."""
        if self.sums.device != device:
            self.sums = torch.zeros_like(self.sums, device=device) if self.sums.is_meta else self.sums.to(device)

    def moved_by(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move to the device where `fn` of `nn.Module._apply` puts tensors, and ignore its values and dtype."""
        self.move_to(fn(self.sums).device)
