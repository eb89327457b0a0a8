"""Activation recomputation (checkpointing): compute activations again in the backward instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from math import sqrt
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..dispatch.torch_internals import skips_side_effects_in_recomputation
from ..dispatch.traced import outside
from ..moe.experts.base import Experts
from .dropout import Part, own_numbers

Model = TypeVar("Model", bound=nn.Module)


class Blocks(nn.ModuleList):
    """Blocks in sequence, each called as ``block(x, *context)``. Blocks of other pipeline stages are None."""

    segment: int = 0  # number of blocks that are recomputed together; 0: no recomputation

    @classmethod
    def of(cls, blocks: Iterable[nn.Module], kept: range) -> Blocks:
        """Blocks whose numbers, from 0, are in a range. Pass a generator, so that the others take no memory.

        All are built, kept or not: each draws the random numbers that it would in the whole model.
        """
        held = cls()
        for index, block in enumerate(blocks):
            held.add_module(str(index), block if index in kept else None)
        return held

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """Hidden states x [B, S, D] -> [B, S, D], through all blocks that are not None."""
        held = iter([block for block in self if block is not None])
        if not self.segment or not torch.is_grad_enabled():
            return _through(held, x, *context)
        again: Callable[..., Any] = partial(checkpoint, _through, use_reentrant=False)
        if torch.compiler.is_compiling() and not skips_side_effects_in_recomputation():
            again = partial(outside, again)
        while segment := list(islice(held, self.segment)):
            x = again(segment, x, *context)
        return x


class Core(nn.Module):
    """Core of attention, between its projections: softmax(q k / sqrt(size)) v, with dropout of the weights.

    Attributes:
        recompute: whether the backward computes it again; the function `recompute` sets it.
        part: this rank's part of all heads, so that ranks drop different elements; `tensor_parallel` and
            `context_parallel` set it.
    """

    recompute: bool = False
    part: Part = Part()

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = False,
        grouped: bool = False,
        mask: Tensor | None = None,
        window: int = 0,
    ) -> Tensor:
        """Attend from S queries to M keys: q [B, heads, S, size], k and v [B, heads, M, size] -> [B, heads, S, size].

        With `grouped`, k and v have fewer heads (grouped-query attention). `mask` is bool, or float to add to the
        scores, and broadcasts to [B, heads, S, M]. It cannot be given together with `causal`. With `window`, a query
        attends to its own position and the window - 1 positions before, as far as a bool `mask` lets it. 0: all before.
        """
        if 0 < window < k.shape[-2]:
            seen = sliding_window(q.shape[-2], k.shape[-2], window, q.device)
            mask, causal = seen if mask is None else seen & mask, False
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._attend, q, k, v, causal, grouped, mask, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return self._attend(q, k, v, causal, grouped, mask)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, grouped: bool, mask: Tensor | None) -> Tensor:
        attend = partial(F.scaled_dot_product_attention, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        if not self.training or not self.dropout:
            return attend(q, k, v)
        with own_numbers(self.part, q.device):
            return attend(q, k, v, dropout_p=self.dropout)


def sliding_window(queries: int, keys: int, window: int, device: torch.device | None = None) -> Tensor:
    """Mask of causal attention to the last `window` positions (arXiv:2004.05150), bool [queries, keys], True = attend.

    The last query is at the position of the last key.

    >>> sliding_window(3, 4, window=2).int().tolist()
    [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    last = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    ahead = torch.arange(keys, device=device) - last  # position of the key, less that of the query
    return (ahead <= 0) & (ahead > -window)


def recompute(model: Model, what: Literal["none", "full", "selective"] = "full", every: int | str = 1) -> Model:
    """Choose the activations that a model recomputes in its backward, in place. It may change between steps.

    With c blocks in a segment, l blocks need memory for l / c segment inputs, and for the activations of one segment:
    l / c A_in + c A_mid. The minimum is at c = sqrt(l A_in / A_mid).

    Args:
        model: module with `Blocks`, such as `GPT`, or any with `MoE` layers.
        what: ``"none"`` keeps all activations. ``"full"``, the default, keeps the input of each segment of blocks, and
            MoE layers repeat their all-to-alls. ``"selective"`` keeps all but the core of attention and the inner
            activations of experts, which are large and cheap to compute; rows do not travel again.
        every: number of blocks in a segment, 1 by default, for "full" alone. ``"sqrt"`` takes the minimum above for
            A_mid = A_in, c = sqrt(l). If a block keeps more inside than its input, a smaller c is better.

    Returns:
        The model.

    Raises:
        ValueError: an unknown choice, or segments without ``"full"``.

    References:
        Chen et al., arXiv:1604.06174. PTD-P, arXiv:2104.04473, section 3.5. Selective: arXiv:2205.05198.

    >>> from turnout.models import GPT, GPTConfig
    >>> model = recompute(GPT(GPTConfig(layers=4)), "full", every=2)
    >>> model.blocks.segment
    2
    """
    if what not in ("none", "full", "selective"):
        raise ValueError(f'recompute must be "none", "full" or "selective"; got {what!r}')
    if every != "sqrt" and (not isinstance(every, int) or every < 1):
        raise ValueError(f'every must be a positive number of blocks or "sqrt"; got {every!r}')
    if every != 1 and what != "full":
        raise ValueError(f'every={every!r} needs recompute "full": "{what}" has no segments; leave out every')
    for part in model.modules():
        if isinstance(part, Blocks):
            held = sum(block is not None for block in part)
            size = max(1, round(sqrt(held))) if every == "sqrt" else int(every)
            part.segment = size if what == "full" else 0
        elif isinstance(part, Experts | Core):
            part.recompute = what == "selective"
    return model


def _through(blocks: Any, x: Tensor, *context: Any) -> Tensor:
    for block in blocks:
        x = block(x, *context)
    return x
