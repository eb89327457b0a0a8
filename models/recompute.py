"""Activations that are computed again in the backward, instead of being kept from the forward."""

from __future__ import annotations

from collections.abc import Callable
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
    """Blocks one after the other: x -> x, each called as ``block(x, *context)``. Some may be None: not held here."""

    segment: int = 0  # so many blocks are recomputed together; 0: none are

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """x through all blocks that are held."""
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
    """What is between the projections of attention: softmax(q k / sqrt(size)) v, and the dropout of its weights.

    Attributes:
        part: of all heads that this rank holds, for `Dropout`; `tensor_parallel` says so.
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
    ) -> Tensor:
        """q [B, heads, S, size], k and v [B, heads, M, size] -> [B, heads, S, size].

        `grouped`: k and v have fewer heads (GQA). `mask`: bool, or float to add to the scores, broadcast to
        [B, heads, S, M]; not together with `causal`.
        """
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._attend, q, k, v, causal, grouped, mask, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return self._attend(q, k, v, causal, grouped, mask)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, grouped: bool, mask: Tensor | None) -> Tensor:
        attend = partial(F.scaled_dot_product_attention, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        if not self.training or not self.dropout:
            return attend(q, k, v)
        with own_numbers(self.part, q.device):
            return attend(q, k, v, dropout_p=self.dropout)


def recompute(model: Model, what: Literal["none", "full", "selective"] = "full", every: int | str = 1) -> Model:
    """Choose what a model computes twice to keep less, in place; may be changed between steps.

    With c blocks in a segment, l blocks keep l / c inputs and, while one segment is in its backward, all that its
    blocks compute: l / c A_in + c A_mid. That is smallest at c = sqrt(l A_in / A_mid) (PTD-P, arXiv:2104.04473,
    section 3.5).

    Args:
        what: ``"none"``; ``"full"``: of each segment of blocks the input alone is kept, and a mixture of experts in it
            exchanges its rows again; ``"selective"`` (arXiv:2205.05198): all is kept but the core of attention and
            what experts have between their rows and their output, which are large for what they cost; rows do not
            travel again.
        every: blocks in a segment, of "full" alone. ``"sqrt"``: the rule above for blocks that keep no more inside
            than their input, c = sqrt(l); with more inside, a smaller c is better.
    """
    if what not in ("none", "full", "selective"):
        raise ValueError(f'recompute must be "none", "full" or "selective"; got {what!r}')
    if every != "sqrt" and (not isinstance(every, int) or every < 1):
        raise ValueError(f'every must be a positive number of blocks or "sqrt"; got {every!r}')
    if every != 1 and what != "full":
        raise ValueError(f'every={every!r} needs recompute "full": there are no segments in "{what}"')
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
