"""The parts of an MoE layer from its arguments: gate, experts, shared experts."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .experts.base import Experts
from .experts.feed_forward import FeedForwardExperts
from .experts.modules import ModuleExperts
from .experts.shared import FeedForward, Residual, ResidualExperts, Sum
from .gates import GATES, Gate


def named_gate(gate: str | Gate, dim: int, num_experts: int, top_k: int | None) -> Gate:
    """The gate that `MoE(gate=)` stands for: one made by name, or the given `Gate` itself."""
    if not isinstance(top_k, int | None):
        raise TypeError(f"top_k must be an integer or None; got {top_k!r}")
    if isinstance(gate, type):
        raise TypeError(f"gate must be a name or a Gate, not a class: pass {gate.__name__}(dim, num_experts, ...)")
    if not isinstance(gate, str):
        own = getattr(gate, "top_k", top_k)
        if top_k not in (None, own):
            raise ValueError(f"top_k={top_k}, but the gate's is {own}: set it in the gate alone, and leave top_k out")
        return gate
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(GATES)} or a Gate; got {gate!r}")
    return GATES[gate](dim, num_experts) if top_k is None else GATES[gate](dim, num_experts, top_k)


def named_experts(
    experts: str | Callable[[], nn.Module] | Experts, dim: int, hidden: int, num_experts: int, bias: bool, seed: int
) -> Experts:
    """The routed experts that `MoE(experts=)` stands for, or the given `Experts` themselves."""
    if isinstance(experts, Experts):
        if experts.num_experts != num_experts:
            raise ValueError(
                f"num_experts={num_experts}, but experts has {experts.num_experts}: give both the same number"
            )
        return experts
    if isinstance(experts, str):
        return FeedForwardExperts(dim, hidden, num_experts, experts, bias, seed)
    if isinstance(experts, nn.Module):
        name = type(experts).__name__
        raise TypeError(f"experts must be a name or a factory, not a module: pass lambda: {name}(...)")
    return ModuleExperts(experts, num_experts, seed)


def named_shared(
    experts: str | Callable[[], nn.Module] | Experts,
    dim: int,
    hidden: int,
    shared: int | nn.Module | Residual,
    bias: bool,
) -> nn.Module | None:
    """The shared experts that `MoE(shared=)` stands for, of the same kind as `experts`; None if there are none."""
    if isinstance(shared, Residual):
        branch = named_shared(experts, dim, hidden, shared.shared, bias)
        if branch is None:
            raise ValueError(f"shared={shared} has no shared expert to weigh: give Residual a number or a module")
        return ResidualExperts(branch, dim)
    if isinstance(shared, nn.Module):
        return shared
    if not isinstance(shared, int) or shared < 0:
        raise TypeError(f"shared must be a number of experts, 0 or more, a module, or Residual(...); got {shared!r}")
    if not shared:
        return None
    if isinstance(experts, Experts):
        raise ValueError(f"shared={shared} needs experts by name or factory; with experts=Experts(...) pass a module")
    return FeedForward(dim, shared * hidden, experts, bias) if isinstance(experts, str) else Sum(experts, shared)
