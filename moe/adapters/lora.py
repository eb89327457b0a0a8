"""LoRA on experts and routers: thin matrices are trained beside frozen ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..build import called
from ..experts.base import Experts
from ..experts.low_rank import LowRank
from ..gates import Gate
from ..layer import MoE

Model = TypeVar("Model", bound=nn.Module)


def add_lora(model: Model, rank: int, alpha: float | None = None, router: bool = True) -> Model:
    """Freeze a model, and put low-rank adapters beside the matrices of its experts and routers, in place.

    Each matrix W [in, out] of each expert gets A [in, r] and B [out, r], and x W becomes x W + alpha / r (x A) B^T
    (LoRA, Hu et al. 2021, arXiv:2106.09685). B is 0: at first nothing changes. A B^T is never formed, so that frozen
    experts have neither gradients nor anything of their size. Adapters are part of the experts: `parallelize` spreads
    them, `sync_gradients`, `clip_grad_norm_` and FSDP treat them alike.

    Call it before or after `parallelize`, before FSDP and the optimizer. Everything in `model` is frozen but the
    adapters; unfreeze what else is to be trained afterwards. On a CPU experts no longer run a few at a time.

    Args:
        model: with `MoE` layers, or one; their experts are named ones, or those of a bridge.
        rank: r. In bfloat16 a multiple of 8 is fastest: torch's grouped products want rows of 16 bytes.
        alpha: None: r, a factor of 1.
        router: adapters for routers too, where the gate has a matrix `weight` [E, D] that makes its logits. Others,
            such as those of bridges, stay frozen.

    Raises:
        ValueError: no layer, adapters already, experts of another kind, or split inside (etp), or wrapped by FSDP.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive integer; got {rank!r}")
    layers = {called(name): m for name, m in model.named_modules() if isinstance(m, MoE)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer")
    for name, layer in layers.items():
        _check(name, layer)
    model.requires_grad_(False)
    scale = 1.0 if alpha is None else alpha / rank
    for layer in layers.values():
        experts = layer.experts
        adapters = {
            name: LowRank(matrix, transposed, rank, scale, experts.seed, name)
            for name, (matrix, transposed) in experts.matrices().items()
        }
        experts.lora = nn.ModuleDict(adapters)
        if router and _linear(layer.gate):
            layer.gate.lora = LowRank(layer.gate.weight, True, rank, scale, experts.seed, "router")
    return model


def merge_lora(model: Model, keep: bool = True) -> Model:
    """Add all adapters of a model to the matrices they stand beside, in place; the function stays the same.

    It then costs what it cost without them, in any kernel. Every rank calls it, without FSDP. Matrices in half
    precision are rounded, by what `unmerge_lora` does not undo. Adapters that are merged already are not added again.

    Args:
        model: what `add_lora` was given.
        keep: adapters stay, out of use, for `unmerge_lora`; a checkpoint does not say that they are merged. False: they
            are gone, and the model has the parameters it had before `add_lora`, frozen still.

    Raises:
        ValueError: no adapters, none that are left to merge or to drop, or matrices split inside by FSDP.
    """
    _merge(model, 1, idle=not keep)
    for module in [] if keep else list(model.modules()):
        if isinstance(module, Experts | Gate) and module.lora is not None:
            del module.lora
            module.lora = None
    return model


def unmerge_lora(model: Model) -> Model:
    """Undo `merge_lora`, but for rounding: the adapters are computed beside the matrices, and may be trained, again.

    Raises:
        ValueError: no adapters, or none that are merged.
    """
    return _merge(model, -1)


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All adapters of a model by name: what there is to train, and to save.

    ``torch.save(lora_parameters(model), file)`` and ``model.load_state_dict(torch.load(file), strict=False)``; where
    experts are spread torch.distributed.checkpoint saves and loads them.
    """
    return {
        f"{name}.{own}" if name else own: p
        for name, module in model.named_modules()
        if isinstance(module, LowRank)
        for own, p in module.named_parameters()
    }


def _merge(model: Model, sign: int, idle: bool = False) -> Model:
    """Merge what is not merged, or with `sign` -1 the reverse; nothing to do is an error, unless `idle`."""
    pairs = list(_pairs(model))
    if not pairs:
        raise ValueError(f"{type(model).__name__} has no adapters: call add_lora first")
    pairs = [(matrix, adapter) for matrix, adapter in pairs if adapter.merged != (sign > 0)]
    if not (pairs or idle):
        raise ValueError(f"the adapters are {'merged already' if sign > 0 else 'not merged'}")
    for matrix, _ in pairs:
        _check_whole("the matrix of an adapter", matrix)
    for matrix, adapter in pairs:
        adapter.merge(matrix, sign)
    return model


def _pairs(model: nn.Module) -> Iterator[tuple[Tensor, LowRank]]:
    """Each frozen matrix, and what stands beside it."""
    for layer in model.modules():
        if isinstance(layer, MoE):
            if layer.experts.lora is not None:
                matrices = layer.experts.matrices()
                yield from ((matrices[name][0], adapter) for name, adapter in layer.experts.lora.items())  # pyright: ignore[reportReturnType]
            if layer.gate.lora is not None:
                yield layer.gate.weight, layer.gate.lora


def _linear(gate: Gate) -> bool:
    return gate.learned and type(gate).logits is Gate.logits


def _check(name: str, layer: MoE) -> None:
    if layer.experts.lora is not None:
        raise ValueError(f"{name} has adapters already")
    matrices = layer.experts.matrices()
    if not matrices:
        raise ValueError(
            f"{name} has experts of a kind whose matrices are not known, {type(layer.experts).__name__}: "
            "put adapters into the modules that its factory builds"
        )
    if getattr(layer.experts, "kernel", "auto") == "triton":
        raise ValueError(f'the experts of {name} are computed by kernel="triton", which has no adapters: set "torch"')
    for own, (matrix, _) in matrices.items():
        _check_whole(f"{own} of {name}", matrix)


def _check_whole(what: str, matrix: Tensor) -> None:
    """Ranks may hold different experts, not parts of one."""
    if isinstance(matrix, DTensor) and any(isinstance(p, Shard) and p.dim for p in matrix.placements):
        raise ValueError(f"{what} is split inside, by etp or FSDP: adapters are added and merged without")
