"""The layers that stand in for a family's modules, and which of them a model has."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...dispatch.reorder import wide
from ...moe.capacity import Capacity
from ...moe.experts.placed import check_home
from ...moe.gates import Gate
from ...moe.gates.gate import jittered
from ...moe.layer import MoE
from ...moe.losses import Balance
from ...moe.routing import Routing
from .block_experts import FusedExperts, gather
from .block_parts import Parts
from .block_twins import HOOKS

Model = TypeVar("Model", bound=nn.Module)
MARKS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


class BridgedMoE(MoE):
    """A `MoE` in the place of a family's block, made of its parts. No balance loss of ours: the model has its own.

    Hooks registered at the block run at this layer.

    Args:
        block: the family's; kept, out of sight of `parameters()`, to be put back.
        parts: what an adapter made of it.
    """

    def __init__(self, block: nn.Module, parts: Parts) -> None:
        E = parts.experts.num_experts
        shared = 0 if parts.shared is None else parts.shared
        own = {"gate": parts.gate, "experts": parts.experts, "shared": shared}
        super().__init__(parts.gate.dim, hidden=1, num_experts=E, balance=0.0, seed=0, **own)  # 1: not looked at
        self.jitter, self.pair, self.flat = parts.jitter, parts.pair, parts.flat
        self._block = (block,)  # in a tuple: not a submodule. Its tensors are those of the parts, spread or not
        for name in (*HOOKS, *MARKS):  # the same dicts: a handle's remove() goes on working
            object.__setattr__(self, name, getattr(block, name))
        self._is_full_backward_hook = block._is_full_backward_hook
        self.train(block.training)

    def forward(self, x: Tensor, mask: Tensor | None = None, ids: Tensor | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x (..., D) -> y (..., D), or [T, D], or (y, None), as the family's block returned it."""
        if self.training and self.jitter:
            x.copy_(
                jittered(x, self.jitter)
            )  # in place, as the families do: in some, the residual has the noise as well
        if self.gate.takes_ids and ids is None and x.ndim > 2:  # gates of families that count by sequence
            ids = torch.arange(len(x), device=x.device).unsqueeze(1).expand(x.shape[:-1])
        y = super().forward(x, mask, ids)
        y = y.flatten(0, -2) if self.flat else y
        return (y, None) if self.pair else y

    def give_back(self) -> nn.Module:
        """The family's block, with the weights of now; where experts are spread, call it on every rank of theirs."""
        getattr(self.experts, "give_back", lambda: gather(self.experts))()
        getattr(self.shared, "give_back", lambda: None)()
        return self.block.train(self.training)

    @property
    def block(self) -> nn.Module:
        """The family's block; its own tensors may be laid out otherwise, until it is given back."""
        return self._block[0]


class BridgedExperts(BridgedMoE):
    """A `MoE` in the place of a family's experts alone, which its block calls with a routing of its own.

    The block stays as it is, whatever its router, its shared experts or its norms do, and so do the names of all that
    is not an expert's. What the layer would need a router for is the model's: `top_k`, `balance` and `capacity` are
    refused.

    Args:
        module: the family's experts, called as (x [T, D], expert int64 [T, k], weight [T, k]) -> [T, D].
        experts: what computes with its tensors.
        top_k: experts a token picks, k, as far as is known before the first forward.
    """

    def __init__(self, module: nn.Module, experts: FusedExperts, top_k: int = 1) -> None:
        super().__init__(module, Parts(ModelsOwnGate(experts.dim, experts.num_experts, top_k), experts))
        self.identities = experts.identities

    def forward(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x [T, D], expert int64 [T, k], weight [T, k] -> y [T, D]; an expert of E or more is none, as the family's."""
        scores = wide(weight).new_zeros(1, 1).expand(len(expert), self.num_experts)  # no loss, so that no one looks
        routing = Routing(expert.long(), wide(weight), scores)
        y = MoE.forward(self, x, routing=routing.keep(expert < self.num_experts))
        if not self.identities:
            return y
        same = (expert >= self.num_experts) & (expert < self.num_experts + self.identities)
        return y + (x * torch.where(same, weight, 0).sum(-1, keepdim=True)).to(x.dtype)

    @property
    def balance(self) -> Balance:
        """No loss, always: the router is outside of this layer."""
        return self._loss.balance

    @balance.setter
    def balance(self, balance: float | Balance) -> None:
        if Balance.of(balance, self.balance) != self.balance:
            raise ValueError(_outside("balance", "use the model's own loss, output_router_logits=True, if it has one"))

    @property
    def capacity(self) -> Capacity | None:
        """None, always: the router is outside of this layer."""
        return None

    @capacity.setter
    def capacity(self, capacity: float | str | Capacity | None) -> None:
        if capacity is not None:
            raise ValueError(_outside("capacity", "leave it None, which drops no token"))


class ModelsOwnGate(Gate):
    """Stands where a gate would, in a layer whose routing the model's own block makes."""

    learned = False

    def forward(self, x: Tensor) -> Routing:
        """ValueError: there is nothing to ask."""
        raise ValueError(_outside("a routing", "call the layer with (x, expert, weight)"))

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """TypeError: weights of other experts are the block's to compute."""
        raise TypeError(_outside("router replay", "replay in the family's router"))

    @property
    def top_k(self) -> int:
        """Experts a token picks, k."""
        return self._top_k

    @top_k.setter
    def top_k(self, top_k: int) -> None:
        if getattr(self, "_top_k", top_k) != top_k:
            raise ValueError(_outside("top_k", "set the `top_k` of the family's router"))
        self.check_top_k(top_k)
        self._top_k = top_k


def _outside(name: str, instead: str) -> str:
    return f"{name} is not to be had in a layer whose router is the model's own and outside of it: {instead}"


def find_bridged(model: nn.Module) -> list[tuple[nn.Module, str, BridgedMoE]]:
    """Parent, name in it, and layer, of what `replace_moe` put there; there may be none."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, BridgedMoE)
    ]


def bridged_layers(model: nn.Module) -> list[tuple[nn.Module, str, BridgedMoE]]:
    """As `find_bridged`, or ValueError if there is nothing that `replace_moe` put there."""
    layers = find_bridged(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer that replace_moe put there")
    return layers


def restore_moe(model: Model) -> Model:
    """Undo `replace_moe`, in place, with the weights of now.

    Where experts are spread each rank gathers all of them: call it on every rank. To write the family's format while
    they are spread, and train on, there is `save_pretrained`.

    Raises:
        ValueError: nothing there that `replace_moe` put there.
    """
    check_home(model, "restore_moe")
    for parent, name, layer in bridged_layers(model):
        setattr(parent, name, layer.give_back())
    for module in model.modules():
        vars(module).pop("save_pretrained", None)  # see `saves_its_family`
    return model
