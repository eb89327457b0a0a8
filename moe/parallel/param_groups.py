"""Parameter groups for an optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from ..experts.base import Experts


def param_groups(
    params: nn.Module | Iterable[nn.Parameter], *, decay_embeddings: bool = True, **options: Any
) -> list[dict[str, Any]]:
    """Optimizer parameter groups for a model that is spread over ranks, with weight decay for its matrices alone.

    No group mixes plain and DTensor parameters, which foreach and fused steps refuse.

    Args:
        params: model, or parameters. `weight_decay` of a model is for its matrices, stacks of them and embeddings.
            Norms and biases get 0, also the experts' biases, which are stacked [E, H]. Given parameters, it is for all.
        decay_embeddings: whether the weights of a model's `nn.Embedding` decay; True by default. A tied head counts as
            an embedding.
        options: options of the optimizer for these parameters, such as lr and weight_decay.

    Returns:
        Groups for an optimizer, four at most.

    >>> groups = param_groups(nn.Linear(4, 4), weight_decay=0.1)
    >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
    [(1, 0.1), (1, 0.0)]
    """
    if not isinstance(params, nn.Module) or "weight_decay" not in options:
        return _alike(params.parameters() if isinstance(params, nn.Module) else params, options)
    matrices = set(_matrices(params, decay_embeddings))
    decayed = [p for p in params.parameters() if p in matrices]
    others = [p for p in params.parameters() if p not in matrices]
    return _alike(decayed, options) + _alike(others, options | {"weight_decay": 0.0})


def _alike(params: Iterable[nn.Parameter], options: dict[str, Any]) -> list[dict[str, Any]]:
    params = list(params)
    kinds = [p for p in params if isinstance(p, DTensor)], [p for p in params if not isinstance(p, DTensor)]
    return [{"params": kind, **options} for kind in kinds if kind]


def _matrices(model: nn.Module, embeddings: bool) -> Iterable[nn.Parameter]:
    """Parameters with two axes or more, besides the axis over which experts are stacked."""
    stacked = {p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    for p in model.parameters():
        if p.ndim - (p in stacked) >= 2 and (embeddings or p not in tables):
            yield p
