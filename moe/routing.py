"""Router output: the expert ids, weights and scores of each token's top-k."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Router output for T tokens: k chosen experts each, among the E experts on all ranks.

    A token never has the same expert twice. T = 0 is allowed. Losses and load statistics use the routing as the gate
    returned it, before capacity drops any assignment.

    Attributes:
        expert: ids of the chosen experts, int64 [T, k]. -1 marks a choice that was dropped or not used.
        weight: factor of each chosen expert's output, float32 or float64 [T, k], 0 where `expert` is -1.
        scores: router scores of all experts [T, E], without noise and without the balance bias.
        logits: router logits [T, E], before softmax or sigmoid. The router z-loss needs them. None, the default, for
            a gate without logits.
        losses: scalar losses that only the gate can compute, by name and not yet weighted. Empty by default.
        mask: bool [T], False for padding tokens, which visit no expert and count in no loss. None, the default, means
            that all tokens are real.
        documents: int64 [T], a number below T for each document, where several share a sequence. Under
            `tensor_parallel` T is that of all its ranks. None, the default: a sequence is one document.

    Raises:
        ValueError: shapes that do not fit together, or k larger than E.
        TypeError: `expert` is not int64, or `weight` is neither float32 nor float64.

    >>> routing = Routing(torch.tensor([[1, 0]]), torch.tensor([[0.75, 0.25]]), torch.tensor([[0.25, 0.75]]))
    >>> routing.num_experts
    2
    >>> routing.keep(torch.tensor([[True, False]])).expert.tolist()
    [[1, -1]]
    """

    expert: Tensor
    weight: Tensor
    scores: Tensor
    logits: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    documents: Tensor | None = None

    def __post_init__(self) -> None:
        if self.expert.ndim != 2 or self.expert.shape != self.weight.shape:
            shapes = f"{tuple(self.expert.shape)} and {tuple(self.weight.shape)}"
            raise ValueError(f"expert and weight must both be [T, k]; got {shapes}")
        if self.scores.ndim != 2 or self.scores.shape[0] != self.expert.shape[0]:
            raise ValueError(f"scores must be [T, E] with T={self.expert.shape[0]}; got {tuple(self.scores.shape)}")
        if self.expert.shape[1] > self.scores.shape[1]:
            k, E = self.expert.shape[1], self.scores.shape[1]
            raise ValueError(f"expert has k={k} choices for each token, but scores has only E={E} experts")
        if self.expert.dtype != torch.int64:
            raise TypeError(f"expert must be int64; got {self.expert.dtype}")
        if self.weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"weight must be float32 or float64, or small weights are lost; got {self.weight.dtype}")

    @property
    def num_experts(self) -> int:
        """Number of experts E, on all ranks together."""
        return self.scores.shape[1]

    def keep(self, kept: Tensor) -> Routing:
        """The same routing without the assignments where `kept`, bool [T, k] or [T, 1], is False."""
        return replace(self, expert=torch.where(kept, self.expert, -1), weight=torch.where(kept, self.weight, 0.0))

    def first(self, choices: int | None) -> Routing:
        """The same routing with only the first `choices` choices of each token; None keeps all."""
        if choices is None:
            return self
        return replace(self, expert=self.expert[:, :choices], weight=self.weight[:, :choices])

    def within(self, documents: Tensor) -> Routing:
        """The same routing with the number of each token's document, int64 (...)."""
        return replace(self, documents=documents.flatten())

    def masked(self, mask: Tensor) -> Routing:
        """The same routing with `mask`, bool [T]: tokens where it is False are padding and visit no expert."""
        return replace(self.keep(mask.unsqueeze(1)), mask=mask)


class Tap(Protocol):
    """A hook of a layer that sees the routing of its gate and returns the routing to use: see `moe.replay`."""

    ended: bool  # whether another hook may replace it

    def __call__(self, gate: Any, tokens: Tensor, routing: Routing) -> Routing:
        """The routing to use, from tokens [T, D] and the gate's own routing."""
        ...


def wrong_shapes(routing: Routing, tokens: int, num_experts: int) -> str | None:
    """Check the type and shapes of a gate's result.

    Returns:
        The end of an error sentence that begins with the gate's name, or None if nothing is wrong.
    """
    if not isinstance(routing, Routing):
        return f"returned a {type(routing).__name__}: return a Routing(expert, weight, scores)"
    if len(routing.expert) != tokens:
        shape = tuple(routing.expert.shape)
        return f"returned expert of shape {shape} for {tokens} tokens: return [T, k], one row for each token"
    if routing.num_experts != num_experts:
        return f"returned scores for {routing.num_experts} experts, but the layer has {num_experts}: return [T, E]"
    return None


def wrong_values(routing: Routing) -> str | None:
    """Check the values of a gate's result, with one wait for the device. Returns as `wrong_shapes` does."""
    expert, E = routing.expert, routing.num_experts
    if not expert.numel():
        return None
    ordered = expert.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    weighs = (expert < 0) & (routing.weight != 0)
    found = [expert.min(), expert.max(), twice.any(), weighs.any()]
    least, most, is_twice, does_weigh = torch.stack([each.to(torch.int64) for each in found]).tolist()
    if least < -1 or most >= E:
        return f"returned expert ids from {least} to {most}: use 0 to E - 1 = {E - 1}, and -1 for an unused choice"
    if is_twice:
        return "chose an expert twice for the same token: choose each at most once, and set unused choices to -1"
    if does_weigh:
        return "gave a weight to an unused choice: where expert is -1, weight must be 0 (Routing.keep sets both)"
    return None


def can_be_read(x: Tensor) -> bool:
    """Whether the host may read a tensor's values: not while compiling, on the meta device, or in a CUDA graph."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())
