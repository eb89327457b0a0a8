"""Dense models of Hugging Face out, mixtures of experts in: blocks of Llama, Qwen, Mistral and those alike."""

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

    A block has Linear layers ``up_proj``, ``down_proj`` and maybe ``gate_proj``, as those of Llama, Mistral, Qwen2
    and Qwen3, or ``up``, ``down`` and maybe ``gate``. At first the model computes what it did (`upcycle`); routers are
    new, and the model's loss knows nothing of them: add `aux_loss(model)`. On the meta device there is nothing to copy:
    blocks are replaced, and `upcycle(model, dense)` fills them once there are values.

    Args:
        model: of transformers, or any module that holds such blocks; alike on every rank, and under one
            `torch.manual_seed`.
        num_experts, top_k: of each layer: all shards of all copies, and how many of them a token picks.
        every: blocks n, 2n, ... are replaced, counted from 1.
        granularity: experts hold 1/granularity of a block each, so that `num_experts` and `top_k` are multiples of it.
        noise, reset, scale: as in `upcycle`.
        options: further arguments of `MoE`. Of a `Gate` each layer gets a copy of its own, initialised anew.

    Raises:
        ValueError: no such block, or one that cannot be replaced, and why; the model is then as it was.
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
    """A layer whose experts are of the block's kind, where the block is."""
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
    """Its parts do not say all (Falcon-H1 multiplies in between, BitNet normalises): tried on random tokens."""
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
    """Parent, name in it, and block, in the order of the model."""
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
