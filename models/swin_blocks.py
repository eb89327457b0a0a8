"""Blocks of `Swin` and their sizes: attention in windows, a dense or an MoE feed-forward network, patch merging.

The norm comes last in each branch (residual post-norm): x + norm(attention(x)), then x + norm(feed_forward(x)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..dispatch.plan import Tokens
from ..moe.capacity import Capacity
from ..moe.experts.activation import weighted
from ..moe.experts.feed_forward import FeedForwardExperts
from ..moe.experts.shared import FeedForward
from ..moe.gates import GATES
from ..moe.gates.cosine import CosineGate
from ..moe.gates.gate import Gate
from ..moe.layer import MoE
from .recompute import Blocks
from .windows import WindowAttention

CAPACITY = Capacity(1.25, drop="priority")  # tokens with the highest score come first


def cosine_gate(dim: int, num_experts: int, top_k: int) -> CosineGate:
    """Router of Swin-MoE: cosines in 256 dimensions, or D if that is less, and a temperature that starts at 0.5."""
    return CosineGate(dim, num_experts, top_k, width=min(256, dim), temperature=0.5)


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """Sizes of a `Swin`. The defaults are SwinV2-T with 8 experts in blocks 2, 4, 6 of stage 3, and 2 of stage 4.

    Args:
        channels: channels of an image, 3 by default.
        patch: side of a patch in pixels; each patch is a token.
        dim: width D of the first stage. Each later stage is twice as wide, and its image half as high and wide.
        depths: number of blocks in each stage.
        heads: number of attention heads in each stage, a divisor of its width.
        window: side of an attention window in tokens. Every second block of a stage has shifted windows.
        pretrained_windows: see `PositionBias`, one number for each stage. None, the default, is 0 for all.
        mlp_ratio: hidden width of a dense feed-forward network, as a multiple of the stage's width; 4 by default. An
            expert is this wide, divided by `top_k`, so that a token's FLOPs are equal.
        classes: number of classes. 0: the model has no head and returns features.
        moe_stages: number of last stages that have MoE layers, 2 by default. 0 makes all blocks dense.
        moe_every: in these stages, every n-th block has an MoE layer; 2 by default.
        num_experts: number of experts E in each MoE layer, on all ranks together.
        top_k: number of experts k that a token picks, 1 by default.
        gate: name of the router (`GATES`), or a function ``(dim, num_experts, top_k) -> Gate``, which each layer calls.
            The default is `cosine_gate`.
        capacity: see `MoE`. The default is 1.25, and tokens with the highest score come first (batch prioritised
            routing, arXiv:2106.05974).
        norm_eps: number that a norm adds to the variance.
        drop_path: probability that the last block leaves out each of its two branches for an image in training
            (stochastic depth, arXiv:1603.09382). It grows evenly from 0 in the first block.
        moe: further arguments of `MoE`, by name, without `shared` and `free`. `experts` is an activation; ``"gelu"``
            with biases by default.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    channels: int = 3
    patch: int = 4
    dim: int = 96
    depths: Sequence[int] = (2, 2, 6, 2)
    heads: Sequence[int] = (3, 6, 12, 24)
    window: int = 8
    pretrained_windows: Sequence[int] | None = None
    mlp_ratio: float = 4.0
    classes: int = 1000
    moe_stages: int = 2
    moe_every: int = 2
    num_experts: int = 8
    top_k: int = 1
    gate: str | Callable[[int, int, int], Gate] = cosine_gate
    capacity: float | str | Capacity | None = CAPACITY
    norm_eps: float = 1e-5
    drop_path: float = 0.0
    moe: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("depths", "heads", "pretrained_windows"):
            if (given := getattr(self, name)) is None:
                continue
            object.__setattr__(self, name, tuple(given))
            if len(given) != len(self.depths) or not len(given):
                raise ValueError(f"{name}={given} must have one number for each stage, as depths={self.depths}")
        for name in ("channels", "patch", "dim", "window", "moe_every", "num_experts", "top_k", "depths", "heads"):
            given = getattr(self, name)
            if any(number < 1 for number in (given if isinstance(given, tuple) else (given,))):
                raise ValueError(f"{name} must be positive; got {given}")
        for name, number in {"classes": self.classes, "pretrained_windows": min(self.windows_before)}.items():
            if number < 0:
                raise ValueError(f"{name} must be 0 or more; got {number}")
        if int(self.mlp_ratio * self.dim) < self.top_k:
            raise ValueError(
                f"mlp_ratio={self.mlp_ratio} x dim={self.dim} is the hidden width, which top_k={self.top_k} experts "
                "share: it must be at least 1 for each"
            )
        for stage, heads in enumerate(self.heads):
            if self.width(stage) % heads:
                raise ValueError(f"heads={heads} of stage {stage + 1} must divide its width {self.width(stage)}")
        if not 0 <= self.moe_stages <= len(self.depths):
            raise ValueError(f"moe_stages={self.moe_stages} must be between 0 and the {len(self.depths)} stages")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1); got {self.drop_path}")
        if isinstance(self.gate, str) and self.gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)} or a function; got {self.gate!r}")
        if wrong := self.moe.keys() & {"gate", "capacity", "top_k", "num_experts", "hidden", "dim"}:
            raise ValueError(
                f"moe={self.moe} must not have {', '.join(sorted(wrong))}: SwinConfig has arguments of its own"
            )
        if wrong := self.moe.keys() & {"shared", "free"}:
            raise ValueError(
                f"moe={self.moe} must not have {', '.join(sorted(wrong))}: routed experts normalise their outputs, and "
                "these would not"
            )
        if not isinstance(self.moe.get("experts", "gelu"), str):
            raise ValueError(f"moe['experts'] must be the name of an activation; got {self.moe['experts']!r}")

    @property
    def windows_before(self) -> Sequence[int]:
        """`pretrained_windows`, with 0 for each stage if it is None."""
        return (0,) * len(self.depths) if self.pretrained_windows is None else self.pretrained_windows

    def width(self, stage: int) -> int:
        """Width of a stage, counted from 0."""
        return self.dim * 2**stage

    def has_experts(self, stage: int, index: int) -> bool:
        """Whether block `index` of a stage has an MoE layer, both counted from 0."""
        return stage >= len(self.depths) - self.moe_stages and (index + 1) % self.moe_every == 0

    def sides(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width in tokens at each stage, of an image of `height` and `width` pixels.

        Raises:
            ValueError: patches, windows or patch merging do not divide them.

        >>> SwinConfig().sides(256, 128)
        [(64, 32), (32, 16), (16, 8), (8, 4)]
        """
        found: list[tuple[int, int]] = []
        image, last = f"an image of {height} x {width} pixels", len(self.depths) - 1
        step = self.patch * self.window * 2**last
        advice = f"resize or pad images to multiples of {step}, or choose another patch or window"
        if not (height and width) or height % self.patch or width % self.patch:
            raise ValueError(f"{image} is not made of patches of {self.patch} x {self.patch} pixels: {advice}")
        sides = height // self.patch, width // self.patch
        for stage in range(last + 1):
            text = f"{image} has {sides[0]} x {sides[1]} tokens at stage {stage + 1}"
            if any(side > self.window and side % self.window for side in sides):
                raise ValueError(f"{text}, which windows of {self.window} do not divide: {advice}")
            if stage < last and any(side % 2 for side in sides):
                raise ValueError(f"{text}, of which patch merging cannot make pairs: {advice}")
            found.append(sides)
            sides = sides[0] // 2, sides[1] // 2
        return found


class Stage(nn.Module):
    """Patch merging, except in the first stage, and the blocks of one stage: [B, height, width, D] -> the same rank."""

    def __init__(self, config: SwinConfig, stage: int) -> None:
        super().__init__()
        self.merge = PatchMerging(config.width(stage - 1)) if stage else None
        self.blocks = Blocks(SwinBlock(config, stage, index) for index in range(config.depths[stage]))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, height, width, D] -> [B, height, width, D], or half as high and wide, and twice as deep."""
        return self.blocks(x if self.merge is None else self.merge(x))


class PatchMerging(nn.Module):
    """Four neighbouring tokens become one of twice the width: [B, 2 height, 2 width, D] -> [B, height, width, 2 D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)
        nn.init.trunc_normal_(self.reduce.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.norm(self.reduce(rearrange(x, "b (h y) (w x) d -> b h w (x y d)", y=2, x=2)))


class SwinBlock(nn.Module):
    """Attention in windows, then a dense or an MoE feed-forward network, each with its norm last.

    Args:
        config: sizes.
        stage: number of the stage, from 0.
        index: number of the block in its stage, from 0. Odd ones have shifted windows.
    """

    def __init__(self, config: SwinConfig, stage: int, index: int) -> None:
        super().__init__()
        dim, heads, pretrained = config.width(stage), config.heads[stage], config.windows_before[stage]
        self.attention = WindowAttention(dim, heads, config.window, index % 2 == 1, pretrained)
        self.attention_norm = nn.LayerNorm(dim, config.norm_eps)
        hidden = int(config.mlp_ratio * dim)
        self.feed_forward: nn.Module
        self.feed_forward_norm: nn.Module
        if config.has_experts(stage, index):
            self.feed_forward = moe(config, dim, hidden // config.top_k)
            self.feed_forward_norm = Affine(dim)  # the experts have normalised their outputs
        else:
            self.feed_forward = FeedForward(dim, hidden, "gelu", bias=True)
            self.feed_forward_norm = nn.LayerNorm(dim, config.norm_eps)
        for norm in (self.attention_norm, self.feed_forward_norm):
            nn.init.zeros_(norm.weight)  # as the released SwinV2: at first a block changes nothing
        before = sum(config.depths[:stage]) + index
        self.drop_path = config.drop_path * before / max(sum(config.depths) - 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states x [B, height, width, D] -> the same shape."""
        x = x + self._dropped(self.attention_norm(self.attention(x)))
        y = self.feed_forward(rearrange(x, "b h w d -> b (h w) d"))  # an image is a sequence to `Balance`
        y = self._dropped(self.feed_forward_norm(y))
        return x + rearrange(y, "b (h w) d -> b h w d", h=x.shape[1])

    def _dropped(self, branch: Tensor) -> Tensor:
        """Leave out the branch for some images in training (stochastic depth), and scale it for the others."""
        if not self.training or not self.drop_path:
            return branch
        kept = torch.rand(len(branch), *[1] * (branch.ndim - 1), device=branch.device) >= self.drop_path
        return branch * (kept / (1 - self.drop_path)).to(branch.dtype)


def moe(config: SwinConfig, dim: int, hidden: int) -> MoE:
    """The MoE layer of a block of width `dim`."""
    number, k = config.num_experts, config.top_k
    gate = GATES[config.gate](dim, number, k) if isinstance(config.gate, str) else config.gate(dim, number, k)
    options = {"experts": "gelu", "bias": True, "seed": int(torch.randint(2**62, (), device="cpu")), **config.moe}
    experts = NormedExperts(
        dim, hidden, number, options.pop("experts"), options.pop("bias"), options["seed"], eps=config.norm_eps
    )
    return MoE(dim, hidden, number, gate=gate, experts=experts, capacity=config.capacity, **options)


class NormedExperts(FeedForwardExperts):
    """Feed-forward experts whose outputs are normalised before the router's weight multiplies them.

    A norm after the layer would undo the weight: norm(w E(x)) = norm(E(x)). With one expert for each token, the router
    would then learn nothing from the task. The norm has no weight and bias: `Affine` has them, after the layer.

    Args:
        dim, hidden, num_experts, activation, bias, seed: see `FeedForwardExperts`.
        eps: number that the norm adds to the variance; 1e-5 by default.
    """

    normed = True

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        activation: str = "gelu",
        bias: bool = True,
        seed: int = 0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(dim, hidden, num_experts, activation, bias, seed)
        self.eps = eps

    @property
    def gathers(self) -> bool:
        """Whether `forward` takes `Tokens`: the norm is of rows, so it does not."""
        return False

    def split_axes(self) -> dict[str, int]:
        """Raise: parts of an expert have parts of its output, which cannot be normalised by themselves."""
        raise ValueError("experts that normalise their outputs cannot be split inside: use a mesh with etp=1")

    def forward(self, rows: Tensor | Tokens, weight: Tensor, counts: Tensor) -> Tensor:
        """See `Experts.forward`."""
        y = super().forward(rows, torch.ones_like(weight), counts)
        return weighted(F.layer_norm(y, y.shape[-1:], eps=self.eps).to(y.dtype), weight)  # autocast's are wider


class Affine(nn.Module):
    """Weight and bias of a norm: x * weight + bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> the same shape."""
        return torch.addcmul(self.bias, x, self.weight)
