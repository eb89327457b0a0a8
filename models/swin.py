"""Swin Transformer V2 (arXiv:2111.09883): an image classifier with attention in shifted windows, and MoE layers.

`swin_blocks.py` has its blocks and their sizes, `windows.py` the attention.
"""

from __future__ import annotations

from einops import rearrange, reduce
from torch import Tensor, nn

from .blocks import active_parameters
from .swin_blocks import Stage, SwinBlock, SwinConfig, cosine_gate

__all__ = ["Swin", "SwinConfig", "cosine_gate"]


class Swin(nn.Module):
    """Swin Transformer V2, with MoE layers in every other block of its last stages (SwinV2-MoE).

    Images may be of any size that patches, windows and merging divide (`SwinConfig.sides`). A stage whose image is not
    larger than a window has one window of that size. The same `torch.manual_seed` gives the same model at every world
    size. ``parallelize(model, mesh)`` spreads the experts, `recompute` recomputes blocks.

    Args:
        config: sizes of the model.

    References:
        Liu et al., Swin Transformer V2, arXiv:2111.09883. SwinV2-MoE: Hwang et al., Tutel, arXiv:2206.03382.

    >>> import torch
    >>> config = SwinConfig(dim=16, depths=(1, 2), heads=(2, 4), window=4, classes=10, num_experts=4)
    >>> Swin(config)(torch.randn(3, 3, 32, 32)).shape
    torch.Size([3, 10])
    """

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.channels * config.patch**2, config.dim)
        self.embed_norm = nn.LayerNorm(config.dim)
        self.stages = nn.ModuleList(Stage(config, stage) for stage in range(len(config.depths)))
        width = config.width(len(config.depths) - 1)
        self.norm = nn.LayerNorm(width, config.norm_eps)
        self.head = nn.Linear(width, config.classes) if config.classes else None
        if self.head is not None:
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of each class.

        Args:
            images: floating point [B, channels, height, width].

        Returns:
            Logits [B, classes], or without a head the mean of the features, [B, D of the last stage].

        Raises:
            ValueError, TypeError: images that do not fit.
        """
        pooled = reduce(self.features(images), "b h w d -> b d", "mean")
        return pooled if self.head is None else self.head(pooled)

    def features(self, images: Tensor) -> Tensor:
        """Hidden states of the last stage after the last norm: images as in `forward` -> [B, height, width, D]."""
        config = self.config
        if images.ndim != 4 or images.shape[1] != config.channels:
            raise ValueError(f"images must be [B, {config.channels}, height, width]; got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point, scaled to about [-1, 1]; got {images.dtype}")
        config.sides(*images.shape[2:])
        patches = rearrange(images, "b c (h p) (w q) -> b h w (c p q)", p=config.patch, q=config.patch)
        x = self.embed_norm(self.embed(patches))
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def flops_per_image(self, height: int, width: int) -> int:
        """FLOPs of one image's forward and backward: 6 per active parameter and token, plus attention."""
        config, total = self.config, 0
        every = config.sides(height, width)
        for number, (stage, sides) in enumerate(zip(self.stages, every, strict=True)):
            assert isinstance(stage, Stage)
            tokens = sides[0] * sides[1]
            if stage.merge is not None:
                total += 6 * tokens * active_parameters(stage.merge)
            for block in stage.blocks:
                assert isinstance(block, SwinBlock)
                biases = sum(p.numel() for p in block.attention.position_bias.parameters() if p.ndim > 1)
                window = min(config.window, sides[0]) * min(config.window, sides[1])
                total += tokens * (6 * (active_parameters(block) - biases) + 12 * config.width(number) * window)
        total += 6 * every[0][0] * every[0][1] * self.embed.weight.numel()
        return total + (0 if self.head is None else 6 * self.head.weight.numel())
