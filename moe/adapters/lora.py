"""LoRA on experts and routers: low-rank adapters are trained beside frozen matrices."""

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
DEFAULT = "default"  # PEFT's name for an adapter without a name


def add_lora(model: Model, rank: int, alpha: float | None = None, router: bool = True, name: str = DEFAULT) -> Model:
    """Freeze a model, and put low-rank adapters beside the matrices of its experts and routers, in place.

    Each matrix W [in, out] of each expert gets A [in, r] and B [out, r], and x W becomes x W + alpha / r (x A) B^T.
    B starts at 0, so at first nothing changes. A B^T is never computed. So training needs no further memory of the size
    of the experts. `parallelize`, `sync_gradients`, `clip_grad_norm_` and FSDP treat adapters as part of the experts.

    Call it before or after `parallelize`, but before FSDP and the optimizer. Everything except the adapters is frozen.
    Afterwards unfreeze what else shall be trained. In a `PeftModel`, PEFT's own adapters stay trainable. Its
    `save_pretrained` would lose the experts' adapters, so it raises: call `turnout.models.hf.save_adapters`. On a CPU,
    adapted experts are no longer computed a few at a time.

    A call with another name adds a second adapter, which is then the one in use (`use_lora`).

    Args:
        model: an `MoE` layer, or a model with some. Their experts are named ones or those of a bridged model. They may
            be in 4 bits (`quantize_experts`).
        rank: rank r of the adapters. In bfloat16 a multiple of 8 is fastest, because torch's grouped GEMM wants rows of
            16 bytes.
        alpha: scale alpha. None, the default, takes r, which is a factor of 1.
        router: whether routers get adapters too; True by default. Only gates whose logits come from a matrix `weight`
            [E, D] can have one. Others stay frozen.
        name: name of the adapter; "default" by default.

    Returns:
        The model.

    Raises:
        ValueError: the model has no layer, an adapter of that name, or a merged one. Experts are of another kind, split
            inside (etp), wrapped by FSDP, or moved by `place_experts`.

    References:
        LoRA: Hu et al. 2021, arXiv:2106.09685.
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
    """Context in which a model computes without its adapters, as the reference model of DPO does.

    It is for forwards alone, because a backward with activation recomputation would compute with adapters again. PEFT's
    own adapters in the same model have another context, ``model.disable_adapter()``.

    Raises:
        ValueError: the model has no adapters, or merged ones.
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
    """Add the adapter in use to its matrices, in place. The model computes the same, as fast as without adapters.

    Every rank calls it, without FSDP. In half precision the sums are rounded, which `unmerge_lora` does not undo.
    Adapters that are merged already are not added again.

    Args:
        model: model that `add_lora` got.
        keep: whether merged adapters are kept for `unmerge_lora`; True by default. A checkpoint does not say that they
            are merged. False removes them. Without other adapters, the model then has the parameters that it had before
            `add_lora`, still frozen.

    Returns:
        The model.

    Raises:
        ValueError: there are no adapters, or none to merge or remove, or matrices are in 4 bits or split by FSDP.
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
    """Undo `merge_lora`, except for rounding. Adapters are computed beside their matrices again, and can be trained.

    Raises:
        ValueError: the model has no adapters, or none that are merged.
    """
    return _merge(model, -1)


def lora_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """The parameters of a model's adapters by name, to train or to save them.

    On one rank, ``torch.save(lora_parameters(model), file)`` saves them, and
    ``model.load_state_dict(torch.load(file), strict=False)`` loads them. On many ranks, torch.distributed.checkpoint
    does.

    Args:
        model: model that `add_lora` got.
        name: name of one adapter. None, the default, takes all.
    """
    wanted = {id(adapter) for own, adapter in _named(model) if name in (None, own)}
    return {
        f"{where}.{own}" if where else own: p
        for where, module in model.named_modules()
        if id(module) in wanted
        for own, p in module.named_parameters()
    }


def _save_without_experts(model: nn.Module, *args: Any, **options: Any) -> None:
    """The `save_pretrained` of a `PeftModel` with adapters of experts: it raises ValueError."""
    if lora_parameters(model):
        raise ValueError(
            "PEFT would save its own adapters alone, and lose those of the experts: call "
            "turnout.models.hf.save_adapters(model, folder), which saves both"
        )
    type(model).save_pretrained(model, *args, **options)  # pyright: ignore


def _merge(model: Model, sign: int, idle: bool = False) -> Model:
    """Merge adapters in use (`sign` 1), or unmerge them (-1). ValueError if there are none, unless `idle`."""
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
    """Each frozen matrix with its adapter."""
    for layer in moe_layers(model).values():
        matrices = layer.experts.matrices()
        for _, adapter in layer.experts.adapters():
            yield from ((matrices[name][0], each) for name, each in adapter.items())
        yield from ((layer.gate.weight, adapter) for _, adapter in layer.gate.adapters())


def _named(model: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """All adapters of a model, each with its name."""
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
    """Seed of a matrix A, another one for each matrix and each adapter."""
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
    """Raise ValueError if ranks hold parts of one expert's matrix."""
    if isinstance(matrix, DTensor) and any(isinstance(p, Shard) and p.dim for p in matrix.placements):
        raise ValueError(f"{what} is split inside, by etp or FSDP: adapters are added and merged without")
