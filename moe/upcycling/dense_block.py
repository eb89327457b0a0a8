"""The tensors and the activation of a dense feed-forward block, by the names that experts use."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..experts.activation import ACTIVATIONS

Dense = nn.Module | Mapping[str, Tensor]
_NAMES = (("up", "gate", "down", "act"), ("up_proj", "gate_proj", "down_proj", "act_fn"))  # `FeedForward`; Llama, Qwen


def dense_tensors(dense: Dense) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor] | None]:
    """The tensors of a dense block, and its activation.

    Returns:
        Tensors by the names of `FeedForwardExperts`, matrices as [in, out]. The activation is None if `dense` is a dict
        of tensors, which does not tell.

    Raises:
        ValueError: a block of an unknown kind.
    """
    if isinstance(dense, Mapping):
        return dict(dense), None
    found = None
    if isinstance(dense, nn.Sequential) and len(dense) == 3:
        found = dense[0], None, dense[2], dense[1]
    for names in _NAMES:
        found = found or tuple(getattr(dense, name, None) for name in names)
        if not (isinstance(found[0], nn.Linear) and isinstance(found[2], nn.Linear) and callable(found[3])):
            found = None
    if found is None:
        raise ValueError(
            f"{type(dense).__name__} is not a kind of dense block that upcycle knows: pass its tensors by name, "
            '{"w_up": [D, H], "w_gate": [D, H], "w_down": [H, D]}'
        )
    up, gate, down, activation = found
    tensors = {}
    for name, linear in {"up": up, "gate": gate, "down": down}.items():
        if isinstance(linear, nn.Linear):
            tensors[f"w_{name}"] = linear.weight.detach().T
            if linear.bias is not None:
                tensors[f"b_{name}"] = linear.bias.detach()
    return tensors, activation


def named_activation(tensors: Mapping[str, Tensor], activation: Callable[[Tensor], Tensor] | None) -> str | None:
    """The name in `ACTIVATIONS` of an activation with the same values, or None. An unknown one gets the first name."""
    x = torch.linspace(-6, 6, 97, dtype=torch.float64, device="cpu")
    for name, ours in ACTIVATIONS.items():
        if ours.gated != ("w_gate" in tensors) or ours.on_up is not None:
            continue
        if activation is None or bool((activation(x) - ours.act.value(x)).abs().max() < 1e-6):
            return name
    return None
