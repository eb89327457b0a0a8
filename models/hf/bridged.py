"""`BridgedMoE` and `BridgedExperts`: layers that replace a family's modules, and `restore_moe`, which undoes it."""

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
    """An `MoE` in the place of a family's block. It adds no balance loss, because the model has its own.

    Hooks that were registered at the block run at this layer.

    Args:
        block: block of the family. It is kept for `restore_moe`, but not as a submodule.
        parts: the parts into which an adapter took it apart.
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
        """x (..., D) -> y (..., D), or y [T, D], or (y, None), in the form that the family's block returns."""
        if self.training and self.jitter:
            # in place, as the families do: in some, the residual has the noise as well
            x.copy_(jittered(x, self.jitter))
        if self.gate.takes_ids and ids is None and x.ndim > 2:  # a gate with a capacity for each sequence
            ids = torch.arange(len(x), device=x.device).unsqueeze(1).expand(x.shape[:-1])
        y = super().forward(x, mask, ids)
        y = y.flatten(0, -2) if self.flat else y
        return (y, None) if self.pair else y

    def give_back(self) -> nn.Module:
        """The family's block with the current weights. If experts are spread over ranks, every rank calls this."""
        getattr(self.experts, "give_back", lambda: gather(self.experts))()
        getattr(self.shared, "give_back", lambda: None)()
        return self.block.train(self.training)

    @property
    def block(self) -> nn.Module:
        """The family's block. Until `give_back`, its tensors may have another layout."""
        return self._block[0]


class BridgedExperts(BridgedMoE):
    """An `MoE` in the place of a family's experts alone. The block calls it with a routing of its own.

    Router, shared experts and everything else in the block stay as they are, with their names. The layer has no router,
    so setting `top_k`, `balance` or `capacity` raises ValueError.

    Args:
        module: the family's experts, called as (x [T, D], expert int64 [T, k], weight [T, k]) -> y [T, D].
        experts: experts that compute with the tensors of `module`.
        top_k: number of experts k that a token picks, 1 by default. It is only a note: the routing decides.
    """

    def __init__(self, module: nn.Module, experts: FusedExperts, top_k: int = 1) -> None:
        super().__init__(module, Parts(ModelsOwnGate(experts.dim, experts.num_experts, top_k), experts))
        self.identities = experts.identities

    def forward(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x [T, D], expert int64 [T, k], weight [T, k] -> y [T, D]. Ids from E on are no experts of the layer."""
        scores = wide(weight).new_zeros(1, 1).expand(len(expert), self.num_experts)  # unused: the layer has no loss
        routing = Routing(expert.long(), wide(weight), scores)
        y = MoE.forward(self, x, routing=routing.keep(expert < self.num_experts))
        if not self.identities:
            return y
        same = (expert >= self.num_experts) & (expert < self.num_experts + self.identities)
        return y + (x * torch.where(same, weight, 0).sum(-1, keepdim=True)).to(x.dtype)

    @property
    def balance(self) -> Balance:
        """Always without a loss, because the router is outside this layer."""
        return self._loss.balance

    @balance.setter
    def balance(self, balance: float | Balance) -> None:
        if Balance.of(balance, self.balance) != self.balance:
            raise ValueError(_outside("balance", "use the model's own loss, output_router_logits=True, if it has one"))

    @property
    def capacity(self) -> Capacity | None:
        """Always None, because the router is outside this layer."""
        return None

    @capacity.setter
    def capacity(self, capacity: float | str | Capacity | None) -> None:
        if capacity is not None:
            raise ValueError(_outside("capacity", "leave it None, which drops no token"))


class ModelsOwnGate(Gate):
    """Placeholder for the gate of a layer that gets its routings from the model's own block."""

    learned = False

    def forward(self, x: Tensor) -> Routing:
        """Raise ValueError: this gate has no router."""
        raise ValueError(_outside("gate", "call the layer with (x, expert, weight)"))

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """Raise TypeError: only the block can weigh experts."""
        raise TypeError(_outside("router replay", "replay in the family's router"))

    @property
    def top_k(self) -> int:
        """Number of experts k that a token picks."""
        return self._top_k

    @top_k.setter
    def top_k(self, top_k: int) -> None:
        if getattr(self, "_top_k", top_k) != top_k:
            raise ValueError(_outside("top_k", "set the `top_k` of the family's router"))
        self.check_top_k(top_k)
        self._top_k = top_k


def _outside(name: str, instead: str) -> str:
    return f"a layer whose router is the model's own has no {name}: {instead}"


def find_bridged(model: nn.Module) -> list[tuple[nn.Module, str, BridgedMoE]]:
    """The bridged layers of a model, each with its parent module and its name there."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, BridgedMoE)
    ]


def bridged_layers(model: nn.Module) -> list[tuple[nn.Module, str, BridgedMoE]]:
    """The same as `find_bridged`, but a model without bridged layers raises ValueError."""
    layers = find_bridged(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer that replace_moe put there")
    return layers


def restore_moe(model: Model) -> Model:
    """Undo `replace_moe` in place. The family's blocks get the current weights.

    If experts are spread over ranks, every rank calls it and gathers all of them. To write the family's format and
    train on, call `save_pretrained` instead.

    Args:
        model: a bridged model.

    Returns:
        The model.

    Raises:
        ValueError: the model has no bridged layer.
    """
    check_home(model, "restore_moe")
    for parent, name, layer in bridged_layers(model):
        setattr(parent, name, layer.give_back())
    for module in model.modules():
        vars(module).pop("save_pretrained", None)  # see `saves_its_family`
    return model
