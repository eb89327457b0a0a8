"""Tensor and sequence parallelism of a GPT, BERT or T5, by DTensor (Megatron-LM, arXiv:1909.08053; arXiv:2205.05198).

Between blocks, a rank of the axis "tp" has its part of every sequence, [B, S / tp, D]. Attention and dense
feed-forward networks gather the sequence, split their matrices by columns and then by rows, and reduce-scatter the
sum. An MoE layer gathers nothing: each rank routes its own tokens, so no token travels twice.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from ..moe.experts.sharded import watching
from ..moe.layer import MoE
from .bert import BERT
from .blocks import Attention, Block, Context
from .dropout import Dropout, Part
from .gpt import GPT
from .multi_token import Depth
from .recompute import Core
from .t5 import T5

Model = TypeVar("Model", GPT, BERT, T5)


def tensor_parallel(model: Model, mesh: DeviceMesh) -> Model:
    """Split a model's matrices, vocabulary and sequences over the ranks of a mesh, in place. Call it on every rank.

    All these ranks give the model the same tokens [B, S], with S a multiple of their number. A T5's source and target
    may be padded to such lengths, with masks. Logits are a DTensor [B, S, vocab], split over the vocabulary, which
    `next_token_loss` takes. Norms, routers and shared experts stay whole on each rank, and `sync_gradients` sums their
    gradients. Call `parallelize` afterwards, then FSDP.

    With dropout, give these ranks the same torch seed, and ranks along "dp" different ones. Then each drops other
    elements of its own part (`turnout.models.dropout`).

    Args:
        model: `GPT`, `BERT`, `T5`, or a pipeline stage of one, built on every rank after the same
            `torch.manual_seed`. The meta device is allowed. A stage passes hidden states [B, S / tp, D] on.
        mesh: mesh of one axis named "tp", `Meshes.dense["tp"]`. With one rank the model stays unchanged.

    Returns:
        The model.

    Raises:
        ValueError: sizes that do not split, or a model that is spread already. Its forward raises one for sequences
            that do not split, and for an empty batch.
        TypeError: another model.
    """
    if not isinstance(model, GPT | BERT | T5):
        raise TypeError(
            f"tensor parallelism splits a GPT, BERT or T5; got {type(model).__name__}: leave tp at 1, and spread "
            "experts and batches of any model by parallelize(model, mesh) and FSDP2"
        )
    if mesh.mesh_dim_names != ("tp",):
        raise ValueError(f'tensor_parallel needs a mesh with the one axis "tp"; got {mesh.mesh_dim_names}')
    if mesh.size() == 1:
        return model
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise ValueError("parameters are spread already: call tensor_parallel once, before parallelize and any FSDP")
    _check(model, mesh.size())
    for module in model.modules():
        if isinstance(module, Dropout | Core):  # both drop elements of split activations: sequences, or heads
            module.part = Part(mesh.get_local_rank(), mesh.size())
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        _split_block(block, mesh)
    if model.embed is not None:
        vocabulary = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
        _apply(model.embed, mesh, vocabulary)
        model.embed.register_forward_pre_hook(partial(_check_length, mesh.size()))
        model.embed.register_forward_pre_hook(_shard_gradient)
        model.embed.register_forward_hook(_put_back, always_call=True)
    if isinstance(model, GPT):
        _split_gpt(model, mesh)
    elif isinstance(model, BERT):
        _split_bert(model, mesh)
    else:
        _split_t5(model, mesh)
    return model


def _split_gpt(model: GPT, mesh: DeviceMesh) -> None:
    """Split what a GPT has beside its embedding and its blocks."""
    depths = [cast(Depth, depth) for depth in model.mtp]
    for depth in depths:
        _apply(depth.join, mesh, OwnTokens())
    for final in [norm for norm in (model.norm, *(depth.norm for depth in depths)) if norm is not None]:
        _apply(final, mesh, SequenceParallel(use_local_output=True))
        _gather_output(final, mesh)
    if model.head is not None:
        _apply(model.head, mesh, ColwiseParallel(input_layouts=Replicate(), use_local_output=False))


def _split_bert(model: BERT, mesh: DeviceMesh) -> None:
    """Split what a BERT has beside its embedding and its blocks."""
    if model.segment is not None:
        _apply(model.segment, mesh, OwnTokens())
        model.segment.register_forward_pre_hook(lambda module, ids: tuple(_own_columns(mesh, each) for each in ids))
    if model.norm is None or model.head is None or model.head_norm is None:
        return
    _apply(model.head, mesh, OwnTokens())
    for final in (model.norm, model.head_norm):
        _apply(final, mesh, SequenceParallel(use_local_output=True))
    _gather_output(model.head_norm, mesh)


def _split_t5(model: T5, mesh: DeviceMesh) -> None:
    """Split what a T5 has beside its embedding and its blocks. Blocks of the decoder share one gathered memory."""
    for bias in [each for each in (model.encoder_bias, model.decoder_bias) if each is not None]:
        _apply(bias, mesh, OwnHeads())
    for final in [each for each in (model.encoder_norm, model.decoder_norm) if each is not None]:
        _apply(final, mesh, SequenceParallel(use_local_output=True))
    _gather_output(model.decoder_dropout, mesh)
    model.decoder.register_forward_pre_hook(partial(_gather_memory, mesh))


def _gather_memory(mesh: DeviceMesh, decoder: nn.Module, args: tuple[Tensor, Context]) -> tuple[Tensor, Context]:
    """Gather the memory, of which each rank has its part of every sequence, once for all blocks of a decoder."""
    x, context = args
    assert context.memory is not None
    memory = DTensor.from_local(context.memory, mesh, [Shard(1)], run_check=False)
    return x, context._replace(memory=memory.redistribute(placements=[Replicate()]))


def _gather_output(module: nn.Module, mesh: DeviceMesh) -> None:
    """Make a module's output a DTensor of whole sequences, so that logits become one, too."""
    gather = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate(), use_local_output=False)
    _apply(module, mesh, gather)


class OwnTokens(ParallelStyle):
    """Parallel style for any module that is whole on every rank and runs on the rank's own tokens or heads.

    Parameters become replicated DTensors, so that optimizers, FSDP and checkpoints see one kind. They are plain
    tensors while the module runs. A gradient is this rank's part of a sum (`Partial`), which is reduced once a step,
    not once a micro-batch.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        whole = {}  # by parameter, so that tied parameters stay tied
        for p in module.parameters():
            replica = DTensor.from_local(p.detach(), device_mesh, [Replicate()], run_check=False)
            whole[p] = nn.Parameter(replica, requires_grad=p.requires_grad)
        for part in module.modules():
            part._parameters.update({name: whole[p] for name, p in part._parameters.items() if p is not None})
        module.register_forward_pre_hook(_lay_out)
        module.register_forward_hook(_put_back, always_call=True)
        return module


class OwnHeads(ParallelStyle):
    """Parallel style for `RelativeBias`, of whose weight [buckets, heads] each rank holds the columns of its heads."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, p in [*module.named_parameters(recurse=False)]:
            part = distribute_tensor(p.detach(), device_mesh, [Shard(1)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(part, requires_grad=p.requires_grad))
        module.register_forward_pre_hook(_lay_out)
        module.register_forward_hook(_put_back, always_call=True)
        return module


def _lay_out(module: nn.Module, args: Any) -> None:
    """Give a module plain tensors for a forward. The gradient of what is whole is this rank's part of a sum."""
    for part in module.modules():
        part.__dict__["_whole"] = dict(part._parameters)
        for name, p in part._parameters.items():
            if isinstance(p, DTensor):
                gradient = [Partial() if each.is_replicate() else each for each in p.placements]
                part._parameters[name] = watching(p.to_local(grad_placements=gradient), p)  # pyright: ignore


def _shard_gradient(embed: nn.Module, args: Any) -> None:
    """Keep the embedding's gradient split: without this redistribution each rank gets all rows of it (torch 2.13)."""
    embed.__dict__["_whole"] = dict(embed._parameters)
    weight = embed.weight
    assert isinstance(weight, DTensor)
    embed._parameters["weight"] = weight.redistribute(placements=weight.placements)  # pyright: ignore


def _put_back(module: nn.Module, args: Any, output: Any) -> None:
    for part in module.modules():
        part._parameters.update(part.__dict__.pop("_whole", {}))


def _split_block(block: Block, mesh: DeviceMesh) -> None:
    plan: dict[str, ParallelStyle] = {}
    for name, positional in {"attention": 3, "cross": 1}.items():  # number of positional arguments
        if (attention := getattr(block, name)) is not None:
            plan |= _attention_plan(name, attention, positional)
    plan["feed_forward_norm"] = SequenceParallel(use_local_output=True)
    if isinstance(block.feed_forward, MoE):
        plan["feed_forward.gate"] = OwnTokens()
        for name in ("shared", "free"):
            if getattr(block.feed_forward, name) is not None:
                plan[f"feed_forward.{name}"] = OwnTokens()
        block.feed_forward.register_forward_pre_hook(partial(_own_ids, mesh), with_kwargs=True)
    else:
        plan["feed_forward"] = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
        plan |= {f"feed_forward.{name}": ColwiseParallel() for name in ("up", "gate")}
        plan["feed_forward.down"] = RowwiseParallel(output_layouts=Shard(1))
    _apply(block, mesh, plan)


def _attention_plan(name: str, attention: Attention, positional: int) -> dict[str, ParallelStyle]:
    others = (None,) * (positional - 1)
    gather = PrepareModuleInput(input_layouts=(Shard(1), *others), desired_input_layouts=(Replicate(), *others))
    plan: dict[str, ParallelStyle] = {
        f"{name}_norm": SequenceParallel(use_local_output=True),
        name: gather,
        **{f"{name}.{each}": ColwiseParallel() for each in ("query", "key", "value")},
        f"{name}.out": RowwiseParallel(output_layouts=Shard(1)),
    }
    if attention.query_norm is not None:  # of the heads that are here
        plan |= {f"{name}.query_norm": OwnTokens(), f"{name}.key_norm": OwnTokens()}
    return plan


def _own_ids(mesh: DeviceMesh, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Cut token ids, masks and documents [B, S] to the columns of this rank's tokens."""
    for name in {"ids", "mask", "documents"} & kwargs.keys():
        if kwargs[name] is not None:
            kwargs[name] = _own_columns(mesh, kwargs[name])
    return args, kwargs


def _own_columns(mesh: DeviceMesh, ids: Tensor) -> Tensor:
    return ids.chunk(mesh.size(), dim=1)[mesh.get_local_rank()]


def _apply(module: nn.Module, mesh: DeviceMesh, plan: ParallelStyle | dict[str, ParallelStyle]) -> None:
    parallelize_module(module, mesh, plan, src_data_rank=None)  # weights are equal on all ranks: nothing is sent


def _check(model: GPT | BERT | T5, ranks: int) -> None:
    """Raise a ValueError for a size that does not split over the ranks, before anything is changed."""
    config = model.config
    sizes = {"vocab": config.vocab, "heads": config.heads, "kv_heads": config.kv_heads or config.heads}
    if any(isinstance(block, Block) and not isinstance(block.feed_forward, MoE) for block in model.modules()):
        sizes["the width of a dense block, (top_k + shared) * hidden"] = config.ffn
    for name, size in sizes.items():
        if size % ranks:
            raise ValueError(
                f"{name}={size} does not split over tp={ranks} ranks; use a multiple of {ranks}, or "
                f"a tp that divides {size}"
            )


def _check_length(ranks: int, embed: nn.Module, args: tuple[Tensor, ...]) -> None:
    length = args[0].shape[-1]
    if not args[0].numel():  # torch 2.13 hangs when it reshapes a DTensor without elements
        raise ValueError(
            f"tokens {tuple(args[0].shape)} have no elements, which tp={ranks} cannot split: give every dp rank at "
            "least one sequence, which may be padding with targets of -100"
        )
    if length % ranks:
        raise ValueError(
            f"sequences of {length} tokens do not split over tp={ranks} ranks; pad or cut them to a multiple of {ranks}"
        )
