"""`Gate`, the base class of routers, and arithmetic that several of them share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dispatch.reorder import wide
from ...dispatch.torch_internals import transformed
from ..experts.low_rank import LowRank
from ..routing import Routing
from .wide_linear import wide_linear


class Gate(nn.Module, ABC):
    """Base class of routers: a gate scores tokens and picks their experts. It knows nothing of ranks.

    To write a gate, derive from this class, write `forward`, and pass an instance to ``MoE(gate=...)``. Randomness
    belongs under ``if self.training``. A subclass may set these class attributes:

    - `learned` = False: nothing in the gate is trained, so it has no router `weight`.
    - `balances_itself` = True: the layer adds no load-balancing loss to the losses that the gate returns.
    - `takes_mask`, `takes_ids` = True: the layer calls ``forward(x, mask=..., ids=...)``. The mask is bool [T], or
      None without padding. Token ids are int64 [T], or None if the model passes none.

    Args:
        dim: model width D.
        num_experts: number of experts E, on all ranks together.
        top_k: number of experts k that a token picks; 1 by default. It may change between steps.
        scale: factor of all weights (the routed scaling factor of DeepSeek-V3, arXiv:2412.19437); 1.0 by default.
        bias: whether logits get a learned `bias` [E]; False by default.

    Raises:
        ValueError, TypeError: a `top_k` that `check_top_k` refuses, or `bias` for a gate that is not learned.

    >>> class NearestGate(Gate):  # each token's expert is the one with the largest logit
    ...     def forward(self, x):
    ...         logits = self.logits(x)
    ...         weight, expert = logits.softmax(-1).topk(self.top_k)
    ...         return Routing(expert, self.scaled(weight), logits.softmax(-1), logits)
    >>> NearestGate(dim=4, num_experts=3)(torch.randn(5, 4)).expert.shape
    torch.Size([5, 1])
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
            raise ValueError(f"{type(self).__name__} computes no logits that bias=True could be added to: leave it out")
        if self.learned:
            self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_parameter("bias", nn.Parameter(torch.empty(num_experts)) if bias else None)
        self.reset_parameters()

    @property
    def top_k(self) -> int:
        """Number of experts k that a token picks."""
        return self._top_k

    @top_k.setter
    def top_k(self, top_k: int) -> None:
        self.check_top_k(top_k)
        self._top_k = top_k

    def check_top_k(self, top_k: int) -> None:
        """Raise ValueError or TypeError unless this gate can pick `top_k` experts. Subclasses add their own rules."""
        if not isinstance(top_k, int):
            raise TypeError(f"top_k must be an integer; got {top_k!r}")
        if not 1 <= top_k <= self.num_experts:
            raise ValueError(f"top_k={top_k} must be between 1 and num_experts={self.num_experts}")

    def reset_parameters(self) -> None:
        """Initialise the router's weight as `nn.Linear` does, uniform within 1 / sqrt(D). The bias starts at zero."""
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
        """Router logits of x: [T, D] -> [T, E], in float32 or float64 whatever the model's dtype and autocast are."""
        logits = projected(x, self.weight, self.bias)
        if self.lora is not None:
            for _, adapter in self.adapters():
                logits = adapter.beside(logits, x, lambda x, a: projected(x, a.T))
        return logits

    def scaled(self, weight: Tensor) -> Tensor:
        """`weight` times `scale`, without a kernel if `scale` is 1."""
        return weight if self.scale == 1 else weight * self.scale

    @abstractmethod
    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [T, D]: choose each token's experts and their weights."""

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """Weights of experts that this gate has not chosen itself, for `replay`.

        Args:
            routing: the gate's own routing of the same tokens. Weights are computed from it, so that they have a graph
                to the router.
            expert: expert ids, int64 [T, k], -1 for none.

        Returns:
            Weights [T, k]. They are not used where the expert is -1.

        Raises:
            TypeError: the gate does not define this method.
        """
        raise TypeError(f"{type(self).__name__} cannot weigh experts it has not chosen: define weigh(routing, expert)")

    def observe(self, routing: Routing) -> None:
        """Called with the layer's routing after each training forward, but not again in activation recomputation."""

    def extra_repr(self) -> str:
        """Text that ``print(model)`` shows."""
        scale = "" if self.scale == 1 else f", scale={self.scale}"
        bias = "" if self.bias is None else ", bias=True"
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}{scale}{bias}"


def uniform(weight: Tensor) -> None:
    """Initialise weight [n, D] with a uniform distribution within 1 / sqrt(D)."""
    bound = 1 / math.sqrt(weight.shape[1])
    nn.init.uniform_(weight, -bound, bound)


def projected(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear map in float32 or float64: x [T, D], weight [n, D], bias [n] -> x weight^T + bias [T, n]."""
    on_gpu = x.device.type in ("cuda", "meta")
    if on_gpu and x.dtype == torch.bfloat16 and weight.dtype in (x.dtype, torch.float32) and not transformed():
        y = wide_linear(x, weight)
        return y if bias is None else y + bias.float()
    dtype = torch.promote_types(x.dtype, torch.float32)  # not .float(), which would narrow float64
    with torch.autocast(x.device.type, enabled=False):  # autocast would compute F.linear in bfloat16
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def topk_softmax(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The softmax over the k largest of logits [..., n], and their indices, both [..., k].

    For k = 1 the softmax is over all n, because over one logit it is the constant 1 and has no gradient.
    """
    if k == 1:
        weight, place = logits.softmax(-1).max(-1, keepdim=True)
        return weight, place
    chosen, place = logits.topk(k)
    return chosen.softmax(-1), place


def distinct(draw: Tensor) -> Tensor:
    """k distinct experts for each token, from random numbers: int64 [T, k] -> int64 [T, k].

    `draw` j is in [0, E - j) and selects among the experts not chosen yet, in ascending order. Uniform draws give
    uniform choices.

    >>> distinct(torch.tensor([[1, 1, 1], [3, 0, 0]])).tolist()  # of 4 experts
    [[1, 2, 3], [3, 0, 1]]
    """
    chosen = draw[:, :1]
    for j in range(1, draw.shape[1]):
        free_below = chosen.sort().values - torch.arange(j, device=draw.device)  # unchosen ids below each chosen one
        place = draw[:, j : j + 1]
        chosen = torch.cat([chosen, place + (free_below <= place).sum(1, keepdim=True)], 1)
    return chosen


def even_routing(x: Tensor, expert: Tensor, num_experts: int, scale: float = 1.0) -> Routing:
    """Routing of tokens x [T, D] to experts [T, k] chosen without scores: all weights scale/k, all scores 1/E."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = torch.full(expert.shape, scale / expert.shape[1], dtype=dtype, device=x.device)
    scores = torch.full((1, 1), 1 / num_experts, dtype=dtype, device=x.device).expand(len(x), num_experts)
    return Routing(expert, weight, scores, normalized=True)


def chosen_scores(scores: Tensor, expert: Tensor, normalize: bool = False) -> Tensor:
    """The scores of some experts: scores [T, E], expert ids int64 [T, k] -> [T, k], 0 where the id is -1.

    With `normalize`, False by default, each token's scores are divided by their sum.
    """
    weight = torch.where(expert < 0, 0.0, scores.gather(1, expert.clamp(min=0)))
    return normalised(weight) if normalize else weight


def normalised(weight: Tensor) -> Tensor:
    """Weights [T, k] divided by each token's sum. A token whose weights are all zero keeps them."""
    return weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)


def jittered(x: Tensor, eps: float) -> Tensor:
    """x times noise drawn uniformly from [1 - eps, 1 + eps] (Switch Transformer, arXiv:2101.03961).

    It is in float32 or float64, as in the rest of the router: bfloat16 has only six numbers within 1 percent of 1.
    """
    x = wide(x)
    return x * torch.empty_like(x).uniform_(1 - eps, 1 + eps)
