"""LoRA on experts and routers: thin matrices are trained beside frozen ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import nn
from torch.distributed.tensor import DTensor, Shard

from ..experts.base import Experts
from ..experts.four_bit import FourBitMatrix, Matrix
from ..experts.low_rank import LowRank
from ..experts.placed import check_home
from ..gates import Gate
from ..layer import MoE, moe_layers
from ..names import called

Model = TypeVar("Model", bound=nn.Module)
DEFAULT = "default"  # as PEFT calls the adapter that nobody named


def add_lora(model: Model, rank: int, alpha: float | None = None, router: bool = True, name: str = DEFAULT) -> Model:
    """Freeze a model, and put low-rank adapters beside the matrices of its experts and routers, in place.

    Each matrix W [in, out] of each expert gets A [in, r] and B [out, r], and x W becomes x W + alpha / r (x A) B^T
    (LoRA, Hu et al. 2021, arXiv:2106.09685). B is 0: at first nothing changes. A B^T is never formed, so that frozen
    experts have neither gradients nor anything of their size. Adapters are part of the experts: `parallelize` spreads
    them, `sync_gradients`, `clip_grad_norm_` and FSDP treat them alike.

    Call it before or after `parallelize`, before FSDP and the optimizer. Everything in `model` is frozen but the
    adapters; unfreeze what else is to be trained afterwards. A `PeftModel` has frozen what it does not train: its own
    adapters go on being trained, and its `save_pretrained`, which knows of them alone, is refused: there is
    `turnout.models.hf.save_adapters` for both. On a CPU experts no longer run a few at a time.

    Called again with another name, it adds a second adapter, which is in use from then on: see `use_lora`.

    Args:
        model: with `MoE` layers, or one; their experts are named ones, or those of a bridge, also in 4 bits
            (`quantize_experts`).
        rank: r. In bfloat16 a multiple of 8 is fastest: torch's grouped products want rows of 16 bytes.
        alpha: None: r, a factor of 1.
        router: adapters for routers too, where the gate has a matrix `weight` [E, D] that makes its logits. Others,
            such as those of bridges, stay frozen.
        name: of the adapter.

    Raises:
        ValueError: no layer, an adapter of that name already or one that is merged, experts of another kind, split
            inside (etp), wrapped by FSDP, or moved by `place_experts`.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive integer; got {rank!r}")
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise ValueError(f"the name of an adapter must be a word such as 'default' or 'reference'; got {name!r}")
    layers = {called(where): layer for where, layer in moe_layers(model).items()}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer")
    check_home(model, "add_lora")
    for where, layer in layers.items():
        _check(where, layer, name)
    _check_unmerged(model, "another one is added")
    if hasattr(model, "peft_config"):
        model.save_pretrained = partial(_save_without_experts, model)  # pyright: ignore[reportArgumentType]
    else:
        model.requires_grad_(False)
    scale = 1.0 if alpha is None else alpha / rank
    for layer in layers.values():
        experts, gate = layer.experts, layer.gate
        experts.requires_grad_(False)
        gate.requires_grad_(False)
        adapters = {
            own: LowRank(matrix, transposed, rank, scale, experts.seed, _drawn_by(own, name))
            for own, (matrix, transposed) in experts.matrices().items()
        }
        experts.lora = nn.ModuleDict() if experts.lora is None else experts.lora
        experts.lora[name] = nn.ModuleDict(adapters)
        if router and _linear(gate):
            gate.lora = nn.ModuleDict() if gate.lora is None else gate.lora
            gate.lora[name] = LowRank(gate.weight, True, rank, scale, experts.seed, _drawn_by("router", name))
    return use_lora(model, name)


def use_lora(model: Model, name: str) -> Model:
    """Use the adapter of this name in place of the one in use: it is computed and trained, all others are neither.

    The optimizer has to know the parameters of both, or be made anew.

    Raises:
        ValueError: no adapter of that name, or one that is merged.
    """
    adapters = list(_named(model))
    if name not in (names := sorted({own for own, _ in adapters})):
        raise ValueError(f"{type(model).__name__} has no adapter {name!r}; it has {', '.join(names) or 'none'}")
    _check_unmerged(model, "another one is used")
    for own, adapter in adapters:
        adapter.active = own == name
        adapter.requires_grad_(adapter.active)
    return model


@contextmanager
def disable_lora(model: Model) -> Iterator[Model]:
    """Inside the `with`, the model without its adapters, such as the reference of DPO; afterwards, with them again.

    For forwards alone: the backward of a model that recomputes activations would recompute with adapters. Those of PEFT
    in the same model have a context of their own, ``model.disable_adapter()``.

    Raises:
        ValueError: no adapters, or adapters that are merged.
    """
    adapters = [adapter for _, adapter in _named(model)]
    if not adapters:
        raise _none(model)
    _check_unmerged(model, "they are switched off")
    before = [adapter.active for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.active = False
        yield model
    finally:
        for adapter, active in zip(adapters, before, strict=True):
            adapter.active = active


def merge_lora(model: Model, keep: bool = True) -> Model:
    """Add the adapter in use to the matrices it stands beside, in place; the function stays the same.

    It then costs what it cost without them, in any kernel. Every rank calls it, without FSDP. Matrices in half
    precision are rounded, by what `unmerge_lora` does not undo. Adapters that are merged already are not added again.

    Args:
        model: what `add_lora` was given.
        keep: adapters stay, out of use, for `unmerge_lora`; a checkpoint does not say that they are merged. False: what
            is merged is gone, and without other adapters the model has the parameters it had before `add_lora`, frozen
            still.

    Raises:
        ValueError: no adapters, none that are left to merge or to drop, matrices in 4 bits, or split inside by FSDP.
    """
    _merge(model, 1, idle=not keep)
    for module in [] if keep else list(model.modules()):
        if isinstance(module, Experts | Gate) and module.lora is not None:
            for name in _names_of_merged(module):
                del module.lora[name]
            if not module.lora:
                del module.lora
                module.lora = None
    return model


def unmerge_lora(model: Model) -> Model:
    """Undo `merge_lora`, but for rounding: the adapters are computed beside the matrices, and may be trained, again.

    Raises:
        ValueError: no adapters, or none that are merged.
    """
    return _merge(model, -1)


def lora_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """The adapters of a model by the names of their parameters: what there is to train, and to save.

    ``torch.save(lora_parameters(model), file)`` and ``model.load_state_dict(torch.load(file), strict=False)``; where
    experts are spread torch.distributed.checkpoint saves and loads them.

    Args:
        model: what `add_lora` was given.
        name: of one adapter; None: of all.
    """
    wanted = {id(adapter) for own, adapter in _named(model) if name in (None, own)}
    return {
        f"{where}.{own}" if where else own: p
        for where, module in model.named_modules()
        if id(module) in wanted
        for own, p in module.named_parameters()
    }


def _save_without_experts(model: nn.Module, *args: Any, **options: Any) -> None:
    """In the place of a PeftModel's `save_pretrained`."""
    if lora_parameters(model):
        raise ValueError(
            "PEFT would save its own adapters alone, and lose those of the experts: call "
            "turnout.models.hf.save_adapters(model, folder), which saves both"
        )
    type(model).save_pretrained(model, *args, **options)  # pyright: ignore


def _merge(model: Model, sign: int, idle: bool = False) -> Model:
    """Merge what is in use and not merged, or with `sign` -1 the reverse; nothing to do is an error, unless `idle`."""
    pairs = list(_pairs(model))
    if not pairs:
        raise _none(model)
    pairs = [(matrix, adapter) for matrix, adapter in pairs if adapter.active and adapter.merged != (sign > 0)]
    if not (pairs or idle):
        raise ValueError(f"the adapters are {'merged already' if sign > 0 else 'not merged'}")
    for matrix, _ in pairs:
        if isinstance(matrix, FourBitMatrix):
            raise ValueError("nothing can be added to experts in 4 bits: dequantize_experts(model) first")
        _check_whole("the matrix of an adapter", matrix)
    for matrix, adapter in pairs:
        adapter.merge(matrix, sign)  # pyright: ignore[reportArgumentType]
    return model


def _pairs(model: nn.Module) -> Iterator[tuple[Matrix, LowRank]]:
    """Each frozen matrix, and what stands beside it."""
    for layer in moe_layers(model).values():
        matrices = layer.experts.matrices()
        for _, adapter in layer.experts.adapters():
            yield from ((matrices[name][0], each) for name, each in adapter.items())
        yield from ((layer.gate.weight, adapter) for _, adapter in layer.gate.adapters())


def _named(model: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """All adapters, by their names."""
    for module in model.modules():
        if isinstance(module, Experts):
            yield from ((name, each) for name, adapter in module.adapters() for each in adapter.values())
        elif isinstance(module, Gate):
            yield from module.adapters()


def _names_of_merged(module: Experts | Gate) -> list[str]:
    if isinstance(module, Gate):
        return [name for name, adapter in module.adapters() if adapter.merged]
    return [name for name, adapter in module.adapters() if all(each.merged for each in adapter.values())]


def _drawn_by(matrix: str, name: str) -> str:
    """What A is drawn by: other numbers for each matrix, and for each adapter."""
    return matrix if name == DEFAULT else f"{matrix}/{name}"


def _linear(gate: Gate) -> bool:
    return gate.learned and type(gate).logits is Gate.logits


def _none(model: nn.Module) -> ValueError:
    return ValueError(f"{type(model).__name__} has no adapters: call add_lora first")


def _check_unmerged(model: nn.Module, before: str) -> None:
    if any(adapter.merged for _, adapter in _named(model)):
        raise ValueError(f"an adapter is merged: call unmerge_lora, or merge_lora(model, keep=False), before {before}")


def _check(where: str, layer: MoE, name: str) -> None:
    if name in dict(layer.experts.adapters()):
        raise ValueError(f"{where} has an adapter {name!r} already: give the second one another name")
    matrices = layer.experts.matrices()
    if not matrices:
        raise ValueError(
            f"{where} has experts of a kind whose matrices are not known, {type(layer.experts).__name__}: "
            "put adapters into the modules that its factory builds"
        )
    if getattr(layer.experts, "kernel", "auto") == "triton":
        raise ValueError(f'the experts of {where} are computed by kernel="triton", which has no adapters: set "torch"')
    if layer.experts.precision is not None:
        raise ValueError(f'the experts of {where} have precision="fp8", which has no adapters: set precision=None')
    for own, (matrix, _) in matrices.items():
        _check_whole(f"{own} of {where}", matrix)


def _check_whole(what: str, matrix: Matrix) -> None:
    """Ranks may hold different experts, not parts of one."""
    if isinstance(matrix, DTensor) and any(isinstance(p, Shard) and p.dim for p in matrix.placements):
        raise ValueError(f"{what} is split inside, by etp or FSDP: adapters are added and merged without")
