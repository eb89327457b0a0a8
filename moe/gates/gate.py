"""What a gate is, and what every gate would otherwise get wrong."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dispatch.reorder import wide
from ..experts.low_rank import LowRank
from ..routing import Routing


class Gate(nn.Module, ABC):
    """Scores tokens and picks their experts. Knows nothing of ranks.

    A new gate is one file: subclass, write `forward`, pass an instance to ``MoE(gate=...)``. Randomness
    belongs under ``if self.training``. What else it may say of itself:

    - `learned` False: it has no router `weight`, as nothing in it is trained.
    - `balances_itself`: the layer adds no balance loss to the losses the gate returns.
    - `takes_mask`, `takes_ids`: the layer calls ``forward(x, mask=..., ids=...)`` with the mask, bool [T],
      None if there is no padding, and the token ids, int64 [T], None if the model passes none.

    Args:
        dim: model width D.
        num_experts: experts on all ranks together, E.
        top_k: experts a token picks, k. May be changed between steps, to what `check_top_k` takes.
        scale: multiplies the weights, last of all ("routed scaling factor", DeepSeek-V3, arXiv:2412.19437).
        bias: a number for each expert, `bias` [E], is learned and added to its logits.
    """

    learned = True
    balances_itself = False
    takes_mask = False
    takes_ids = False
    lora: nn.ModuleDict | None
    bias: nn.Parameter | None

    def __init__(self, dim: int, num_experts: int, top_k: int = 1, scale: float = 1.0, bias: bool = False) -> None:
        super().__init__()
        self.dim, self.num_experts, self.top_k, self.scale = dim, num_experts, top_k, scale
        self.lora = None  # adapters beside `weight` by name, in a ModuleDict: see `add_lora`
        if bias and not self.learned:
            raise ValueError(f"{type(self).__name__} has no router whose logits could have a bias: leave bias=True out")
        if self.learned:
            self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_parameter("bias", nn.Parameter(torch.empty(num_experts)) if bias else None)
        self.reset_parameters()

    @property
    def top_k(self) -> int:
        """Experts a token picks, k."""
        return self._top_k

    @top_k.setter
    def top_k(self, top_k: int) -> None:
        self.check_top_k(top_k)
        self._top_k = top_k

    def check_top_k(self, top_k: int) -> None:
        """ValueError or TypeError unless this gate can pick k experts; a subclass adds its own rule."""
        if not isinstance(top_k, int):
            raise TypeError(f"top_k must be an integer; got {top_k!r}")
        if not 1 <= top_k <= self.num_experts:
            raise ValueError(f"top_k={top_k} must lie between 1 and num_experts={self.num_experts}")

    def reset_parameters(self) -> None:
        """Initialise the router's weight as `nn.Linear` does: uniform within 1 / sqrt(D); bias and adapter as zero."""
        if self.learned:
            uniform(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self._reset_adapter()

    def _reset_adapter(self) -> None:
        for _, adapter in self.adapters():
            adapter.reset_parameters()

    def adapters(self) -> list[tuple[str, LowRank]]:
        """The adapters beside `weight`, with their names."""
        return [] if self.lora is None else list(self.lora.items())  # pyright: ignore[reportReturnType]

    def logits(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, E], float32 or wider, whatever the model's dtype and autocast say."""
        logits = projected(x, self.weight, self.bias)
        for _, adapter in self.adapters():
            logits = adapter.beside(logits, x, lambda x, a: projected(x, a.T))
        return logits

    def scaled(self, weight: Tensor) -> Tensor:
        """Weights times `scale`; at 1, as it mostly is, without a kernel for it."""
        return weight if self.scale == 1 else weight * self.scale

    @abstractmethod
    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [T, D]."""

    def observe(self, routing: Routing) -> None:
        """Look at the layer's routing after each training forward; not in eval, and once where it is recomputed."""

    def extra_repr(self) -> str:
        """What print(model) shows."""
        scale = "" if self.scale == 1 else f", scale={self.scale}"
        bias = "" if self.bias is None else ", bias=True"
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}{scale}{bias}"


def uniform(weight: Tensor) -> None:
    """Fill weight [n, D] evenly within 1 / sqrt(D)."""
    bound = 1 / math.sqrt(weight.shape[1])
    nn.init.uniform_(weight, -bound, bound)


def projected(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, D], weight [n, D], bias [n] -> x weight^T + bias [T, n], float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)  # not .float(): float64 stays float64
    with torch.autocast(x.device.type, enabled=False):  # inside, F.linear of float32 gives bfloat16
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def best(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of logits [..., n]: their softmax and their places, [..., k] both.

    For k = 1 the softmax is over all n: over one it would be the constant 1, without gradient.
    """
    if k == 1:
        weight, place = logits.softmax(-1).max(-1, keepdim=True)
        return weight, place
    chosen, place = logits.topk(k)
    return chosen.softmax(-1), place


def distinct(draw: Tensor, num_experts: int) -> Tensor:
    """Numbers int64 [T, k], the j-th in [0, E - j), -> experts [T, k], no one twice; even draws, even choices.

    Draw j is the number of an expert among those not yet chosen, in order.

    >>> distinct(torch.tensor([[1, 1, 1], [3, 0, 0]]), num_experts=4).tolist()
    [[1, 2, 3], [3, 0, 1]]
    """
    chosen = draw[:, :1]
    for j in range(1, draw.shape[1]):
        free_below = chosen.sort().values - torch.arange(j, device=draw.device)  # not yet chosen, per chosen one
        place = draw[:, j : j + 1]
        chosen = torch.cat([chosen, place + (free_below <= place).sum(1, keepdim=True)], 1)
    return chosen


def even(x: Tensor, expert: Tensor, num_experts: int, scale: float = 1.0) -> Routing:
    """Of tokens x [T, D] to experts [T, k] that no score chose: weights scale/k, scores 1/E."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = torch.full(expert.shape, scale / expert.shape[1], dtype=dtype, device=x.device)
    scores = torch.full((1, 1), 1 / num_experts, dtype=dtype, device=x.device).expand(len(x), num_experts)
    return Routing(expert, weight, scores)


def normalised(weight: Tensor) -> Tensor:
    """Weights [T, k] that sum to 1 for each token; all zeros where they are."""
    return weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)


def jittered(x: Tensor, eps: float) -> Tensor:
    """x times noise drawn uniformly from [1 - eps, 1 + eps] (Switch Transformer, arXiv:2101.03961).

    In float32 or wider, as the router computes anyway: bfloat16 has six numbers within 1 percent of 1.
    """
    x = wide(x)
    return x * torch.empty_like(x).uniform_(1 - eps, 1 + eps)
