"""Context parallelism of a GPT, BERT or T5: ranks of the axis "cp" hold parts of the same sequences.

Everything but attention works on single tokens, so a rank computes it for its own part of each sequence. For attention
there are two ways. Ulysses (arXiv:2309.14509) trades sequences for heads: an all-to-all gives each rank whole sequences
of some of the heads, and another brings the result back. Ring attention (`ring.py`) is for more ranks than heads, in a
GPT, whose attention is causal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any, Literal, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..dispatch import mesh as axes
from ..dispatch.collectives import all_to_all
from ..dispatch.mesh import Meshes
from .bert import BERT, BERTConfig
from .blocks import Attention, Context
from .dropout import Dropout, Part
from .gpt import GPT, GPTConfig
from .loss import next_token_loss
from .recompute import Blocks, Core
from .ring import Ring
from .t5 import T5, RelativeBias, T5Config

Model = TypeVar("Model", GPT, BERT, T5)
How = Literal["ulysses", "ring"]


@dataclass(frozen=True)
class SequenceSplit:
    """How sequences are split over the ranks of the axis "cp". Make it by `SequenceSplit.of`.

    Attributes:
        meshes: meshes of the job.
        how: ``"ulysses"``, with sequences cut in order, or ``"ring"``, with sequences cut in zig-zag.
    """

    meshes: Meshes
    how: How

    @classmethod
    def of(cls, config: GPTConfig | BERTConfig | T5Config, meshes: Meshes, how: How | None = None) -> SequenceSplit:
        """The split for a model.

        Args:
            config: sizes of the whole model.
            meshes: meshes of the job.
            how: ``"ulysses"`` needs heads / tp to be a multiple of cp. ``"ring"`` is for a GPT without dropout, windows
                or documents. None, the default, takes Ulysses where heads allow it.

        Raises:
            ValueError: a way that the model does not allow.
        """
        return cls(meshes, attention_of(config, meshes.dense[axes.CP].size(), meshes.dense[axes.TP].size(), how))

    @property
    def group(self) -> ProcessGroup | None:
        """Ranks with other parts of the same sequences; None if sequences are whole."""
        cp = self.meshes.dense[axes.CP]
        return cp.get_group() if cp.size() > 1 else None

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of whole sequences, which lie along an axis: [B, S, ...] -> [B, S / cp, ...].

        Raises:
            ValueError: sequences that do not split.
        """
        cp = self.meshes.dense[axes.CP]
        if cp.size() == 1:
            return x
        rank, parts = cp.get_local_rank(), cp.size() * (2 if self.how == "ring" else 1)
        if x.shape[dim] % parts:
            raise ValueError(
                f"sequences of {x.shape[dim]} tokens do not split into {parts} parts for cp={cp.size()} ranks; pad or "
                f"cut them to a multiple of {parts}"
            )
        chunks = x.chunk(parts, dim)
        return chunks[rank] if self.how == "ulysses" else torch.cat([chunks[rank], chunks[-1 - rank]], dim)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """`next_token_loss` of this rank's logits [B, S / cp, vocab], and of the targets of whole sequences [B, S]."""
        return next_token_loss(logits, self.own(targets), self.group)


def attention_of(config: GPTConfig | BERTConfig | T5Config, cp: int, tp: int, how: How | None = None) -> How:
    """How attention works where cp ranks split sequences: arguments and errors as for `SequenceSplit.of`."""
    if how not in ("ulysses", "ring", None):
        raise ValueError(f'how must be "ulysses", "ring" or None; got {how!r}')
    if cp == 1:
        return how or "ulysses"
    heads, kv_heads = config.heads // tp, max(1, (config.kv_heads or config.heads) // tp)
    shared = kv_heads * (cp // gcd(cp, kv_heads))  # heads of keys and values after each is repeated for its ranks
    splits = heads % cp == 0 and heads % shared == 0
    causal = isinstance(config, GPTConfig)
    if how is None:
        how = "ulysses" if splits or not causal else "ring"
    if how == "ulysses":
        if splits:
            return how
        raise ValueError(
            f"Ulysses: heads={config.heads} with kv_heads={config.kv_heads or config.heads} do not split over cp={cp} "
            f"x tp={tp} ranks; use {'ring attention, or ' if causal else ''}a cp that divides heads / tp"
        )
    if not causal:
        raise ValueError(
            f"ring attention is causal and for a GPT alone; got {type(config).__name__}: use Ulysses, for which "
            f"heads={config.heads} must split over cp={cp} x tp={tp} ranks"
        )
    if config.dropout or config.windows or config.eod is not None:
        raise ValueError(
            f"ring attention has no dropout, windows or documents; got dropout={config.dropout}, "
            f"windows={config.windows}, eod={config.eod}: leave them out, or use Ulysses, for which "
            f"heads={config.heads} must split over cp={cp} x tp={tp} ranks"
        )
    return how


def context_parallel(model: Model, split: SequenceSplit) -> Model:
    """Split sequences over the ranks of the axis "cp", in place. Call it on every rank.

    All these ranks give the model the same tokens [B, S]. Each gets the logits of its own part [B, S / cp, vocab], and
    the loss is ``split.loss(logits, targets)``. Masks are of whole sequences as well. A T5's source and target both
    split, and may be padded to such lengths, with masks. Call it after `tensor_parallel`, and before `parallelize` and
    FSDP. `parallel_model` does all of this.

    Args:
        model: `GPT`, `BERT`, `T5`, or a pipeline stage of one, built on every rank after the same `torch.manual_seed`.
            A stage passes hidden states [B, S / cp / tp, D] on.
        split: how sequences are split, ``SequenceSplit.of(config, meshes)``. With cp = 1 the model stays unchanged.

    Returns:
        The model.

    Raises:
        ValueError: a model whose sequences are split already, or that does not allow this split.
        TypeError: another model.

    References:
        DeepSpeed Ulysses, arXiv:2309.14509. Ring attention, arXiv:2310.01889.
    """
    if not isinstance(model, GPT | BERT | T5):
        raise TypeError(
            f"context parallelism splits a GPT, BERT or T5; got {type(model).__name__}: leave cp at 1, and spread "
            "experts and batches of any model by parallelize(model, mesh) and FSDP2"
        )
    cp, tp = split.meshes.dense[axes.CP], split.meshes.dense[axes.TP]
    if cp.size() == 1:
        return model
    attention_of(model.config, cp.size(), tp.size(), split.how)  # the split may have been made for another model
    if any(isinstance(module, Ulysses | Ring) for module in model.modules()):
        raise ValueError("sequences are split already: call context_parallel once")
    for module in [*model.modules()]:
        if isinstance(module, Dropout | Core):  # both drop elements of split activations: sequences, or heads
            module.part = Part(cp.get_local_rank() * tp.size() + tp.get_local_rank(), cp.size() * tp.size())
        elif isinstance(module, Blocks):
            module.register_forward_pre_hook(OwnContext(split))
        elif isinstance(module, Attention):
            module.core = Ulysses(module.core, split.meshes) if split.how == "ulysses" else Ring(split.meshes)
        elif isinstance(module, RelativeBias):
            module.part = Part(cp.get_local_rank(), cp.size())  # of the heads that tp leaves to this rank
    if isinstance(model, GPT) and model.head_losses is not None:
        model.head_losses.own, model.head_losses.group = split.own, split.group
    for table in [model.embed, model.segment] if isinstance(model, BERT) else [model.embed]:
        if table is not None:
            table.register_forward_pre_hook(partial(_own_tokens, split), prepend=True)  # before the hooks of tp
    return model


class OwnContext:
    """Forward pre-hook of blocks: of the `Context` of whole sequences it gives them this rank's part."""

    def __init__(self, split: SequenceSplit) -> None:
        self.split = split

    def __call__(self, blocks: nn.Module, args: tuple[Tensor, Context]) -> tuple[Tensor, Context]:
        """Hidden states x [B, S / cp / tp, D] and their context."""
        x, context = args
        length = x.shape[1] * self.split.meshes.sequences.size()
        parts: dict[str, Tensor] = {}
        for name in ("cos", "sin", "tokens", "mask", "documents"):  # attention sees whole sequences, as its masks do
            if (whole := getattr(context, name)) is not None:
                parts[name] = self.split.own(whole[:length], dim=0) if name in ("cos", "sin") else self.split.own(whole)
        return x, context._replace(**parts)


def _own_tokens(split: SequenceSplit, embed: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (split.own(args[0]),)


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
        """Attend as `Core`: q [B, heads, S / cp, size], k and v [B, kv_heads, M / cp, size] -> the shape of q.

        A mask is of whole sequences. If it has an axis of heads, it is of this rank's heads / cp.
        """
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
