"""Context parallelism of a GPT: ranks of the axis "cp" hold parts of the same sequences (Ulysses, arXiv:2309.14509).

Everything but attention works on single tokens, so a rank computes it for its own part of each sequence. Attention
trades sequences for heads: an all-to-all gives each rank whole sequences of some of the heads, and another brings the
result back.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..dispatch import mesh as axes
from ..dispatch.collectives import all_to_all
from ..dispatch.mesh import Meshes
from .blocks import Attention, Block, Context
from .dropout import Dropout, Part
from .gpt import GPT
from .recompute import Core


def context_parallel(model: GPT, meshes: Meshes) -> GPT:
    """Split sequences over the ranks of the axis "cp", in place. Call it on every rank.

    Call it after `tensor_parallel`, and before `parallelize` and FSDP. Each rank then gives the model its own part of
    every sequence, `own_part(tokens, meshes)`, and takes the loss of its own part,
    ``next_token_loss(logits, own_part(targets, meshes), meshes.dense["cp"].get_group())``. `parallel_model` does all of this.

    Args:
        model: `GPT`, or a pipeline stage of one, built on every rank after the same `torch.manual_seed`.
        meshes: meshes of the job. With cp = 1 the model stays unchanged.

    Returns:
        The model.

    Raises:
        ValueError: more ranks than attention can have, or a model that is spread already.

    References:
        DeepSpeed Ulysses, arXiv:2309.14509.
    """
    cp, tp = meshes.dense[axes.CP], meshes.dense[axes.TP]
    if cp.size() == 1:
        return model
    if any(isinstance(module, Ulysses) for module in model.modules()):
        raise ValueError("sequences are split already: call context_parallel once")
    _check(model, cp.size(), tp.size())
    for module in model.modules():
        if isinstance(module, Dropout | Core):  # both drop elements of split activations: sequences, or heads
            module.part = Part(cp.get_local_rank() * tp.size() + tp.get_local_rank(), cp.size() * tp.size())
    for block in model.blocks:
        if isinstance(block, Block):  # blocks of other pipeline stages are None
            block.attention.core = Ulysses(block.attention.core, meshes)
    model.blocks.register_forward_pre_hook(OwnPositions(meshes))
    return model


def own_part(x: Tensor, meshes: Meshes) -> Tensor:
    """This rank's part of whole sequences along "cp": [B, S, ...] -> [B, S / cp, ...].

    Raises:
        ValueError: sequences that do not split.
    """
    cp = meshes.dense[axes.CP]
    if x.shape[1] % cp.size():
        raise ValueError(
            f"sequences of {x.shape[1]} tokens do not split over cp={cp.size()} ranks; pad or cut them to a multiple "
            f"of {cp.size()}"
        )
    return x.chunk(cp.size(), dim=1)[cp.get_local_rank()]


class OwnPositions:
    """Forward pre-hook of a model's blocks that gives them the rotary angles of this rank's positions."""

    def __init__(self, meshes: Meshes) -> None:
        self.meshes = meshes

    def __call__(self, blocks: nn.Module, args: tuple[Tensor, Context]) -> tuple[Tensor, Context]:
        """Hidden states x [B, S / cp / tp, D] and their `Context`, with the angles of all positions."""
        x, context = args
        cp, tp = self.meshes.dense[axes.CP], self.meshes.dense[axes.TP]
        cos, sin, length = context.cos, context.sin, x.shape[1] * tp.size()
        assert cos is not None and sin is not None
        if length * cp.size() > len(cos):
            raise ValueError(
                f"{cp.size()} parts of {length} tokens are longer than seq_len={len(cos)}; give each rank its own part "
                "of the sequences, own_part(tokens, meshes)"
            )
        own = slice(length * cp.get_local_rank(), length * (cp.get_local_rank() + 1))
        return x, context._replace(cos=cos[own], sin=sin[own])


class Ulysses(nn.Module):
    """Core of attention of sequences that are split over "cp": all-to-all, this rank's heads, all-to-all.

    If keys and values have fewer heads than there are ranks, ranks share them: a head is sent to several.

    Args:
        core: core of attention for whole sequences.
        meshes: meshes of the job.
    """

    def __init__(self, core: Core, meshes: Meshes) -> None:
        super().__init__()
        self.core, self.meshes = core, meshes

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False, **options: Any) -> Tensor:
        """Attend as `Core`: q [B, heads, S / cp, size], k and v [B, kv_heads, S / cp, size] -> the shape of q."""
        cp = self.meshes.dense[axes.CP]
        ranks, group = cp.size(), cp.get_group()
        shared = ranks // gcd(ranks, k.shape[1])  # number of ranks that need the same head of k and v
        if shared > 1:
            k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        leaving = [rearrange(x, "b (ranks h) s d -> ranks b h s d", ranks=ranks) for x in (q, k, v)]
        q, k, v = (rearrange(x, "ranks b h s d -> b h (ranks s) d") for x in all_to_all(*leaving, group=group))
        y = self.core(q, k, v, causal=causal, **options | {"grouped": k.shape[1] != q.shape[1]})
        (y,) = all_to_all(rearrange(y, "b h (ranks s) d -> ranks b h s d", ranks=ranks), group=group)
        return rearrange(y, "ranks b h s d -> b (ranks h) s d")


def _check(model: GPT, cp: int, tp: int) -> None:
    """Raise a ValueError for heads that do not split over the ranks, before anything is changed."""
    config = model.config
    heads, kv_heads = config.heads // tp, (config.kv_heads or config.heads) // tp
    shared = kv_heads * (cp // gcd(cp, kv_heads))  # heads of keys and values after each is repeated for its ranks
    if heads % cp or heads % shared:
        raise ValueError(
            f"heads={config.heads} with kv_heads={config.kv_heads or config.heads} do not split over cp={cp} x "
            f"tp={tp} ranks: cp may be a divisor of heads / tp"
        )
