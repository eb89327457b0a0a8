"""QLoRA: frozen matrices of experts in 4 bits, with adapters beside them."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from ..experts.base import Experts
from ..experts.four_bit import BLOCK, FourBitMatrix
from ..layer import moe_layers
from ..names import called
from .lora import Model

KINDS = ("nf4",)


@torch.no_grad()
def quantize_experts(model: Model, kind: str = "nf4") -> Model:
    """Freeze the experts of a model, and store their matrices in 4 bits, in place: 4.5 bits per number with the scales.

    Forward and backward dequantise a few experts at a time, and keep nothing of it. With `add_lora` this is QLoRA,
    without its second quantisation of the scales. Biases, routers and shared experts keep their dtype.

    Call it before or after `parallelize` and `add_lora`, on a CPU or a GPU. Each matrix is quantised on its device, one
    expert at a time. Parameters of the experts are new objects, so make the optimizer afterwards. In a state dict each
    matrix is ``NAME.packed`` and ``NAME.absmax``, which load into a quantised model.

    Args:
        model: an `MoE` layer, or a model with some. Their experts are named ones or those of a bridged model.
        kind: number format; ``"nf4"``, the default, is the only one.

    Returns:
        The model.

    Raises:
        ValueError: the model has no layer. Experts are in 4 bits already, of another kind, split inside (etp), wrapped
            by FSDP or on the meta device, or a matrix has no whole number of blocks of 64 numbers.
        ImportError: bitsandbytes is not installed.

    References:
        QLoRA: Dettmers et al. 2023, arXiv:2305.14314.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    experts = _experts(model)
    for name, each in experts.items():
        _check(name, each)
    for each in experts.values():
        for own, p in each.named_parameters():
            p.requires_grad_(p.requires_grad and own.startswith("lora."))
        for owner, own in _places(each):
            _put(owner, own, FourBitMatrix(getattr(owner, own)))
    return model


@torch.no_grad()
def dequantize_experts(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Undo `quantize_experts` in place, except for rounding. The matrices are tensors again, and still frozen.

    The model computes the same. Call it before `merge_lora`, or before a bridged model is saved.

    Args:
        model: model that `quantize_experts` got.
        dtype: dtype of the matrices. None, the default, takes the one that they had before.

    Returns:
        The model.

    Raises:
        ValueError: the model has no experts in 4 bits.
    """
    places = [(owner, own) for each in _experts(model).values() if each.in_four_bits for owner, own in _places(each)]
    if not places:
        raise ValueError(f"{type(model).__name__} has no experts in 4 bits")
    for owner, own in places:
        matrix = getattr(owner, own)
        _put(owner, own, nn.Parameter(matrix.dense(dtype or matrix.dtype), requires_grad=False))
    return model


def _experts(model: nn.Module) -> dict[str, Experts]:
    """The experts of each layer by the layer's name. Experts that layers share come once."""
    found: dict[Experts, str] = {}
    for name, layer in moe_layers(model).items():
        found.setdefault(layer.experts, called(name))
    if not found:
        raise ValueError(f"{type(model).__name__} has no MoE layer")
    return {name: experts for experts, name in found.items()}


def _places(experts: Experts) -> list[tuple[nn.Module, str]]:
    """The modules that have the matrices, and the name of each there."""
    matrices = {id(matrix) for matrix, _ in experts.matrices().values()}
    return [
        (module, own)
        for module in experts.modules()
        for own, each in (*module._parameters.items(), *module._modules.items())
        if id(each) in matrices
    ]


def _put(owner: nn.Module, name: str, matrix: nn.Module | nn.Parameter) -> None:
    delattr(owner, name)  # a parameter's name cannot become a module's
    setattr(owner, name, matrix)


def _check(name: str, experts: Experts) -> None:
    if not experts.matrices():
        raise ValueError(f"{name} has experts of a kind whose matrices are not known, {type(experts).__name__}")
    if experts.in_four_bits:
        raise ValueError(f"the experts of {name} are in 4 bits already")
    if getattr(experts, "kernel", "auto") == "triton":
        raise ValueError(f'the experts of {name} are computed by kernel="triton", which takes no 4 bits: set "torch"')
    if experts.precision is not None:
        raise ValueError(f'the experts of {name} have precision="fp8", which takes no 4 bits: set precision=None')
    for own, (matrix, _) in experts.matrices().items():
        if isinstance(matrix, DTensor) and any(
            isinstance(placed, Shard) and placed.dim for placed in matrix.placements
        ):
            raise ValueError(f"{own} of {name} is split inside, by etp or FSDP: quantise the experts without")
        if matrix.is_meta:
            raise ValueError(f"{own} of {name} is on the meta device: quantise the experts once they have weights")
        if matrix.shape[1:].numel() % BLOCK:
            raise ValueError(
                f"{own} of {name}, {tuple(matrix.shape[1:])} for each expert, is no whole number of blocks of {BLOCK} "
                "numbers"
            )
