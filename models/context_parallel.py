"""Context parallelism of a GPT: ranks of the axis "cp" hold parts of the same sequences (Ulysses, arXiv:2309.14509).

Everything but attention works on single tokens, so a rank computes it for its own part of each sequence. Attention
trades sequences for heads: an all-to-all gives each rank whole sequences of some of the heads, and another brings the
result back.
"""

from __future__ import annotations

from functools import partial
from math import gcd
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from ..dispatch import mesh as axes
from ..dispatch.collectives import all_to_all
from ..dispatch.mesh import Meshes
from .blocks import Block, Context
from .dropout import Dropout, Part
from .gpt import GPT, check_gpt
from .recompute import Blocks, Core


def context_parallel(model: GPT, meshes: Meshes) -> GPT:
    """Split sequences over the ranks of the axis "cp", in place. Call it on every rank.

    All these ranks give the model the same tokens [B, S]. Each gets the logits of its own part [B, S / cp, vocab], and
    the loss is ``next_token_loss(logits, own_part(targets, meshes), meshes.dense["cp"].get_group())``. Call it after
    `tensor_parallel`, and before `parallelize` and FSDP. `parallel_model` does all of this.

    Args:
        model: `GPT`, or a pipeline stage of one, built on every rank after the same `torch.manual_seed`. A stage passes
            hidden states [B, S / cp / tp, D] on.
        meshes: meshes of the job. With cp = 1 the model stays unchanged.

    Returns:
        The model.

    Raises:
        ValueError: more ranks than attention can have, or a model that is spread already.
        TypeError: a model that is no `GPT`.

    References:
        DeepSpeed Ulysses, arXiv:2309.14509.
    """
    check_gpt(model, "context parallelism")
    cp, tp = meshes.dense[axes.CP], meshes.dense[axes.TP]
    if cp.size() == 1:
        return model
    if any(isinstance(module, Ulysses) for module in model.modules()):
        raise ValueError("sequences are split already: call context_parallel once")
    _check(model, cp.size(), tp.size())
    for module in model.modules():
        if isinstance(module, Dropout | Core):  # both drop elements of split activations: sequences, or heads
            module.part = Part(cp.get_local_rank() * tp.size() + tp.get_local_rank(), cp.size() * tp.size())
        elif isinstance(module, Blocks):
            module.register_forward_pre_hook(OwnContext(meshes))
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        block.attention.core = Ulysses(block.attention.core, meshes)
    if model.head_losses is not None:
        model.head_losses.own, model.head_losses.group = partial(own_part, meshes=meshes), cp.get_group()
    if model.embed is not None:
        model.embed.register_forward_pre_hook(partial(_own_tokens, meshes), prepend=True)  # before those of tp
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


class OwnContext:
    """Forward pre-hook of blocks: of the `Context` of whole sequences it gives them this rank's part."""

    def __init__(self, meshes: Meshes) -> None:
        self.meshes = meshes

    def __call__(self, blocks: nn.Module, args: tuple[Tensor, Context]) -> tuple[Tensor, Context]:
        """Hidden states x [B, S / cp / tp, D] and their context."""
        x, context = args
        cp, tp = self.meshes.dense[axes.CP], self.meshes.dense[axes.TP]
        length = x.shape[1] * tp.size()
        own = slice(length * cp.get_local_rank(), length * (cp.get_local_rank() + 1))
        parts = {name: getattr(context, name)[own] for name in ("cos", "sin")}
        for name in ("tokens", "mask"):
            whole = getattr(context, name)
            parts[name] = None if whole is None else own_part(whole, self.meshes)
        return x, context._replace(**parts)


def _own_tokens(meshes: Meshes, embed: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (own_part(args[0], meshes),)


class Ulysses(nn.Module):
    """Core of attention of sequences that are split over "cp": all-to-all, this rank's heads, all-to-all.

    If keys and values have fewer heads than there are ranks, ranks share them: a head is sent to several.

    Args:
        core: core of attention for whole sequences.
        meshes: meshes of the job.
    """

    splits_sequences = True  # `parallelize` asks for it

    def __init__(self, core: nn.Module, meshes: Meshes) -> None:
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
