"""`replace_dense` turns dense models of Hugging Face (Llama, Qwen, Mistral and others) into mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...moe.experts.activation import ACTIVATIONS
from ...moe.gates import Gate
from ...moe.layer import MoE
from ...moe.upcycling.dense_block import dense_tensors, named_activation
from ...moe.upcycling.upcycle import upcycle

Model = TypeVar("Model", bound=nn.Module)


def replace_dense(
    model: Model,
    num_experts: int,
    top_k: int = 2,
    every: int = 1,
    granularity: int = 1,
    noise: float = 0.0,
    reset: float = 0.0,
    scale: float | None = None,
    **options: Any,
) -> Model:
    """Put an upcycled `MoE` in the place of every n-th feed-forward block of a dense model, in place.

    A block has Linear layers ``up_proj``, ``down_proj`` and maybe ``gate_proj``, as in Llama, Mistral, Qwen2 and Qwen3,
    or ``up``, ``down`` and maybe ``gate``. At first the model computes what it did before (`upcycle`). Routers are new,
    and the model's own loss does not balance them: add `aux_loss(model)`. On the meta device blocks are only replaced.
    Call ``upcycle(model, dense)`` once there are values.

    Args:
        model: a model of transformers, or any module with such blocks. It is the same on every rank, and all ranks call
            this under the same `torch.manual_seed`.
        num_experts: number of experts E of each layer, counting all parts of all copies of a block.
        top_k: number of experts k that a token picks; 2 by default.
        every: n, so that blocks n, 2n, ... are replaced, counted from 1; 1 by default.
        granularity: number of experts into which a copy of a block is cut, 1 by default. It divides `num_experts` and
            `top_k`.
        noise, reset, scale: as in `upcycle`.
        options: further arguments of `MoE`. Each layer gets its own copy of a `Gate`, with new initial values.

    Returns:
        The model.

    Raises:
        ValueError: the model has no such block, or one that cannot be replaced. The model is unchanged.
    """
    if every < 1 or granularity < 1:
        raise ValueError(f"every and granularity must be positive; got {every} and {granularity}")
    blocks = list(_blocks(model))
    if len(blocks) < every:
        raise ValueError(
            f"{type(model).__name__} has {len(blocks)} dense blocks that are known: none is number {every}"
        )
    layers = []
    for parent, name, block in blocks[every - 1 :: every]:
        layer = _layer(block, num_experts, top_k, granularity, options)
        if not any(p.is_meta for p in block.parameters()):
            _check_function(block)
            upcycle(layer, block, noise, reset, scale)
        layers.append((parent, name, layer))
    for parent, name, layer in layers:
        setattr(parent, name, layer)
    return model


def _layer(block: nn.Module, num_experts: int, top_k: int, granularity: int, options: dict[str, Any]) -> MoE:
    """A layer whose experts have the block's activation, on the block's device and in its dtype."""
    tensors, activation = dense_tensors(block)
    (dim, hidden), like = tensors["w_up"].shape, tensors["w_up"]
    kind = named_activation(tensors, activation)
    if kind is None:
        gated = "gated by " if "w_gate" in tensors else ""
        raise ValueError(f"{type(block).__name__} is {gated}{activation}: experts are {', '.join(ACTIVATIONS)}")
    if hidden % granularity:
        raise ValueError(f"{type(block).__name__} is {hidden} wide, which granularity={granularity} does not divide")
    bias = any(each.startswith("b_") for each in tensors)
    if isinstance(gate := options.get("gate"), Gate):
        options = options | {"gate": deepcopy(gate)}
        options["gate"].reset_parameters()
    with torch.device(like.device):
        layer = MoE(dim, hidden // granularity, num_experts, top_k, experts=kind, bias=bias, **options)
    return layer.to(like).train(block.training)


@torch.no_grad()
def _check_function(block: nn.Module) -> None:
    """Raise ValueError if a block computes more than its parts show, on random tokens (Falcon-H1, BitNet)."""
    tensors, activation = dense_tensors(block)
    w_up, training = tensors["w_up"], block.training
    x = torch.randn(16, len(w_up), generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(w_up)
    expected = _perceptron(tensors, activation, x)
    try:
        y = block.eval()(x)
    finally:
        block.train(training)
    if not (y - expected).norm() <= 0.05 * expected.norm():  # half precision, at a large width
        raise ValueError(f"{type(block).__name__} computes more than {sorted(tensors)} and its activation say")


def _perceptron(tensors: Mapping[str, Tensor], activation: Any, x: Tensor) -> Tensor:
    hidden, *gate = (
        x @ tensors[f"w_{name}"] + tensors.get(f"b_{name}", 0) for name in ("up", "gate") if f"w_{name}" in tensors
    )
    hidden = activation(gate[0]) * hidden if gate else activation(hidden)
    return hidden @ tensors["w_down"] + tensors.get("b_down", 0)


def _blocks(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """The dense blocks of a model in its order, each with its parent module and its name there."""
    for parent in model.modules():
        children = dict(parent.named_children())
        for name, child in children.items():
            if "experts" not in children and not isinstance(child, nn.Sequential) and _known(child):
                yield parent, name, child


def _known(block: nn.Module) -> bool:
    try:
        dense_tensors(block)
    except ValueError:
        return False
    return True
