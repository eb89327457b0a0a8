"""How evenly the experts are used, and what was dropped."""

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
    """How many tokens each expert got, measured before capacity drops any; padding is left out.

    Attributes:
        tokens_per_expert: int64 [E], assignments each expert was chosen for.
        dropped: share of assignments that capacity dropped, 0 to 1.
        entropy: of the load, over log E: 1 = even, log k / log E = all tokens on the same k experts.
        imbalance: largest load over the mean load: 1 = even, E / k = all tokens on the same k experts.
    """

    tokens_per_expert: Tensor
    dropped: Tensor
    entropy: Tensor
    imbalance: Tensor


@dataclass(frozen=True)
class Stats(Load):
    """Load of one forward, on this rank. Tensors on the layer's device: reading one waits for it.

    `turnout.moe.load` has the load of all ranks, over many forwards.

    Attributes:
        tokens_per_expert, dropped, entropy, imbalance: as in `Load`.
        nonfinite: bool, NaN or infinity among the gate's weights.
    """

    nonfinite: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, chosen: Tensor, kept: Tensor, weight: Tensor, num_experts: int) -> Stats:
        """Measure a routing: experts chosen and, after capacity, kept, int64 [T, k]; weight [T, k]. No host sync."""
        tokens = load(chosen, num_experts)
        return cls(*measured(tokens, tokens.sum() - (kept >= 0).sum()), nonfinite=~weight.isfinite().all())


def measured(
    tokens: Tensor, dropped: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of a `Load`, from int64 [E] tokens of each expert and the number of dropped assignments."""
    total, E = tokens.sum().clamp(min=1).to(dtype), len(tokens)
    share = tokens / total
    return tokens, dropped / total, torch.special.entr(share).sum() / math.log(max(E, 2)), share.max() * E


class LoadCount:
    """A layer's load, added up over its forwards on the device, until `turnout.moe.load` takes it.

    It is no buffer: DDP would overwrite it with rank 0's, and after `to_empty` it could be anything.
    """

    def __init__(self, num_experts: int) -> None:
        # choices of no expert (-1), of each expert, and then the assignments that capacity dropped
        self.sums = torch.zeros(1 + num_experts + 1, dtype=torch.int64)

    @torch.no_grad()
    def add(self, chosen: Tensor, dropped: Tensor | None, num_experts: int) -> None:
        """Count a forward: experts chosen, int64 [T, k]; which of them were dropped, bool [T, k], None for none."""
        if transformed():
            return  # `torch.func` lets no function change what it was not given
        if len(self.sums) != num_experts + 2:  # another gate or other free experts: begin anew
            self.sums = LoadCount(num_experts).sums
        if self.sums.device != chosen.device:
            self.move_to(chosen.device)
        ids = chosen.flatten() + 1
        self.sums.scatter_add_(0, ids, torch.ones_like(ids))
        if dropped is not None:
            self.sums[-1].add_(dropped.sum())

    def __reduce__(self) -> tuple[type[LoadCount], tuple[int]]:
        return LoadCount, (len(self.sums) - 2,)  # a copy has counted nothing yet

    def take(self) -> Tensor:
        """int64 [E + 1], tokens of each expert and then those dropped, since the last call."""
        taken = self.sums[1:].clone()
        self.sums.zero_()
        return taken

    def move_to(self, device: torch.device) -> None:
        """Go to another device; from meta, where nothing can be counted, with zeros."""
        if self.sums.device != device:
            self.sums = torch.zeros_like(self.sums, device=device) if self.sums.is_meta else self.sums.to(device)

    def moved_by(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Go where `fn` of `nn.Module._apply` puts tensors; it may fill them anew, or cast them."""
        self.move_to(fn(self.sums).device)
