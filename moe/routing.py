"""A gate's ticket: which experts a token goes to, with what weight, and what the choice was made from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """What every gate returns. T tokens, k choices each, E experts in all (on all ranks).

    No expert appears twice for one token. T = 0 is legal. Losses and load statistics are made from the
    routing as the gate returned it, before capacity drops anything.

    Attributes:
        expert: int64 [T, k], chosen experts, -1 = dropped or unused.
        weight: float32 or wider [T, k], what each expert's output is multiplied by, 0 where expert is -1.
        scores: [T, E], what the choice was made from, without noise or balancing bias.
        logits: [T, E] before softmax or sigmoid, or None; the router z-loss needs them.
        losses: scalars only the gate can compute, unweighted.
        mask: bool [T] or None, False = padding: chosen by nobody, counted nowhere.
    """

    expert: Tensor
    weight: Tensor
    scores: Tensor
    logits: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.expert.ndim != 2 or self.expert.shape != self.weight.shape:
            shapes = f"{tuple(self.expert.shape)} and {tuple(self.weight.shape)}"
            raise ValueError(f"expert and weight must both be [T, k]; got {shapes}")
        if self.scores.ndim != 2 or self.scores.shape[0] != self.expert.shape[0]:
            raise ValueError(f"scores must be [T, E], T={self.expert.shape[0]}; got {tuple(self.scores.shape)}")
        if self.expert.shape[1] > self.scores.shape[1]:
            raise ValueError(f"k={self.expert.shape[1]} choices among only E={self.scores.shape[1]} experts")
        if self.expert.dtype != torch.int64:
            raise TypeError(f"expert must be int64; got {self.expert.dtype}")
        if self.weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"weight must be float32 or wider, or small weights are lost; got {self.weight.dtype}")

    @property
    def num_experts(self) -> int:
        """E, the experts on all ranks together."""
        return self.scores.shape[1]

    def keep(self, kept: Tensor) -> Routing:
        """Drop the assignments where `kept`, bool [T, k] or [T, 1], is False. The others do not change."""
        return replace(self, expert=torch.where(kept, self.expert, -1), weight=torch.where(kept, self.weight, 0.0))

    def first(self, choices: int | None) -> Routing:
        """So many of each token's choices, the first ones, and no others; None: all."""
        if choices is None:
            return self
        return replace(self, expert=self.expert[:, :choices], weight=self.weight[:, :choices])

    def masked(self, mask: Tensor) -> Routing:
        """Take padding out: tokens where `mask`, bool [T], is False go to no expert."""
        return replace(self.keep(mask.unsqueeze(1)), mask=mask)


class Tap(Protocol):
    """What a layer shows the routing of its gate, and takes the routing to use from: see `moe.replay`."""

    ended: bool  # another one may take its place

    def __call__(self, gate: Any, tokens: Tensor, routing: Routing) -> Routing:
        """tokens [T, D] and the gate's own routing -> the routing to use."""
        ...


def wrong_shapes(routing: Routing, tokens: int, num_experts: int) -> str | None:
    """What is wrong with a gate's answer for T `tokens` and E experts, as the end of a sentence; None: nothing."""
    if not isinstance(routing, Routing):
        return f"returned a {type(routing).__name__}: return a Routing(expert, weight, scores)"
    if len(routing.expert) != tokens:
        return f"returned expert {tuple(routing.expert.shape)} for {tokens} tokens: return [T, k], a row for each token"
    if routing.num_experts != num_experts:
        return f"scores {routing.num_experts} experts, but the layer has {num_experts}: return scores [T, E]"
    return None


def wrong_values(routing: Routing) -> str | None:
    """The same of the values, all read from the device at once."""
    expert, E = routing.expert, routing.num_experts
    if not expert.numel():
        return None
    ordered = expert.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    weighs = (expert < 0) & (routing.weight != 0)
    found = [expert.min(), expert.max(), twice.any(), weighs.any()]
    least, most, is_twice, does_weigh = torch.stack([each.to(torch.int64) for each in found]).tolist()
    if least < -1 or most >= E:
        return (
            f"chose experts from {least} to {most}: number them from 0 to E - 1 = {E - 1}, and leave a choice out by -1"
        )
    if is_twice:
        return "chose an expert twice for the same token: choose each at most once, and leave a choice out by -1"
    if does_weigh:
        return "gave a weight to a choice it left out: where expert is -1, weight must be 0 (Routing.keep does both)"
    return None


def can_be_read(x: Tensor) -> bool:
    """Whether a tensor has values that the host may wait for: not while compiling, on meta, or in a CUDA graph."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())
