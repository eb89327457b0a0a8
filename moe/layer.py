"""The MoE layer. `MoE.forward` is the way of a token, from top to bottom: route, drop, dispatch, experts, combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..dispatch import BoundedDispatcher, Dispatcher
from ..dispatch.local import LocalDispatcher
from ..dispatch.place import Place
from ..dispatch.plan import Plan
from ..dispatch.steps import Beside
from ..dispatch.torch_internals import in_backward
from ..dispatch.traced import outside
from .build import named_experts, named_gate, named_shared
from .capacity import Capacity, over_capacity
from .experts.base import Experts, autocast
from .experts.shared import Residual, ResidualExperts
from .experts.zero_computation import FreeExperts
from .gates import Gate
from .losses import Balance, LayerLoss, StepLosses
from .names import described
from .parallel.weight_travel import WeightTravel, chosen
from .routing import Routing, Tap, can_be_read, wrong_shapes, wrong_values
from .stats import LoadCount, Stats


class MoE(nn.Module):
    """Mixture of experts: each token visits k of E expert networks, and its output is their weighted sum.

    It replaces a feed-forward block: x (..., D) -> y (..., D) in the same dtype. Add ``aux_loss(model)`` to the loss in
    each training step, and a layer warns once if a step leaves it out. One process holds all experts until
    ``parallelize(model, mesh)`` spreads them over ranks.

    Args:
        dim: model width D.
        hidden: hidden width H of each expert.
        num_experts: number of experts E, on all ranks together.
        top_k: number of experts k that a token picks. None, the default, takes the gate's own: 1 for switch, sinkhorn,
            base, random and hash, 2 for the others.
        gate: name of the router, or a `Gate`. Names are ``"topk"`` (the default), ``"switch"``, ``"gshard"``,
            ``"noisy_topk"``, ``"hierarchical"``, ``"sigmoid"`` (call `update_expert_biases` after each step),
            ``"expert_choice"`` (not causal), ``"cosine"``, ``"sinkhorn"``, ``"base"``, ``"random"`` and ``"hash"``
            (pass `ids`).
        experts: activation of the experts by name: ``"swiglu"`` (the default), ``"geglu"``, ``"gelu"``, ``"relu"``,
            ``"relu2"`` or another of `moe.experts.activation.ACTIVATIONS`. A factory ``() -> nn.Module`` of modules
            [n, D] -> [n, D] makes experts of any kind (`ModuleExperts`). An `Experts` module is used as it is. Both
            ignore `hidden` and `bias`.
        capacity: capacity factor, or a `Capacity` with the factor in eval mode, the dropping order and padding.
            ``"as needed"`` pads every expert to the largest load. None, the default, is dropless without padding.
        balance: weight of the load-balancing loss, 0.01 by default, or a `Balance` that also says which tokens are
            balanced and has the router z-loss. 0 adds no loss.
        shared: number of shared experts, which every token visits; 0 by default. A module [T, D] -> [T, D] replaces
            them. `Residual` weighs them against the routed experts.
        free: kinds of zero-computation experts, which the gate may choose as well: ``"null"``, ``"identity"`` and
            ``"constant"`` (`FreeExperts`); none by default.
        bias: whether named experts have biases; False by default.
        seed: seed of the experts' initial values, the same on all ranks. None, the default, draws one from torch's
            default generator.

    Raises:
        ValueError, TypeError: an argument or input does not fit. The message names it.
        DispatchError: ranks disagree, or a weight of the router is NaN. Every rank raises.

    >>> layer = MoE(dim=16, hidden=32, num_experts=8, top_k=2)
    >>> layer(torch.randn(4, 10, 16)).shape
    torch.Size([4, 10, 16])
    >>> capacity = Capacity(1.25, drop="position")
    >>> layer = MoE(16, 32, 8, capacity=capacity, balance=Balance(0.01, over="global"), shared=1)
    >>> layer.capacity, layer.balance, layer.top_k = 1.0, 0.1, 1  # may change in every step; other fields stay
    >>> layer.capacity, layer.balance.over
    (Capacity(factor=1.0, eval_factor=None, minimum=1, drop='position', pad=False, at_most=None), 'global')
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        top_k: int | None = None,
        gate: str | Gate = "topk",
        experts: str | Callable[[], nn.Module] | Experts = "swiglu",
        capacity: float | str | Capacity | None = None,
        balance: float | Balance = 0.01,
        shared: int | nn.Module | Residual = 0,
        free: Sequence[str] = (),
        bias: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, size in {"dim": dim, "hidden": hidden, "num_experts": num_experts}.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer; got {size!r}")
        self._capacity, self._loss = Capacity.of(capacity), LayerLoss(Balance.of(balance))
        seed = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed

        self.dim, self.num_experts = dim, num_experts
        self.gate = named_gate(gate, dim, num_experts + len(free), top_k)
        self.experts = named_experts(experts, dim, hidden, num_experts, bias, seed)
        self.shared = named_shared(experts, dim, hidden, shared, bias)
        self.free = FreeExperts(free, dim) if free else None
        self.dispatcher: Dispatcher = LocalDispatcher()
        # `parallelize` sets the next four
        self.place: Place | None = None  # the layer's index and name in the model
        self.weights: WeightTravel | None = None  # experts whose weights come to the tokens
        self.balance_group: ProcessGroup | None = None  # ranks that share the batch
        self.sequence_group: ProcessGroup | None = None  # ranks that hold parts of the same sequences
        self.tap: Tap | None = None  # records or replays routings
        self._last: tuple[Tensor, Tensor, Tensor] | None = None
        self._losses, self._count = StepLosses(), LoadCount(self._choices)
        self._checked: set[tuple[type, bool]] = set()  # gates whose first routing was checked, in training and in eval

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        ids: Tensor | None = None,
        routing: Routing | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """x (..., D) -> y (..., D), same dtype.

        `mask`: bool (...), False = padding, which goes to no expert, shared ones included, whatever stands in it: y
        and the gradient of x are zero there. `ids`: int64 (...), for gates that route by token id; others ignore them.
        `routing`: of the T tokens, made elsewhere or before; the gate is then not asked. `documents`: int64 (...), see
        `Routing.documents`: the balance loss over "sequence" takes each of them by itself.
        """
        try:
            self._begin()
            self._check(x, mask, ids, documents)
            real = None if mask is None else mask.flatten()
            tokens = rearrange(x, "... d -> (...) d")
            if real is not None:  # padding may hold NaN: zeros keep it out of outputs and gradients
                tokens = torch.where(real.unsqueeze(1), tokens, 0)
            routing = self._route(tokens, real, ids, routing)  # choose experts and weights
            routing = routing if documents is None else routing.within(documents)
            routed = routing if self.free is None else routing.keep(routing.expert < self.num_experts)
            # drop assignments over capacity, then lay out which token fills which row
            kept, padded, by_load = over_capacity(routed, self.capacity, self.top_k, self.num_experts, self.training)
            slot = kept.expert if (slots := self.experts.slots) is None else slots[kept.expert]  # see `place_experts`
            plan = Plan.of(slot, self.num_experts, padded, self.place, by_load)
        except Exception:
            self.dispatcher.refuse(self.num_experts, x.device, self.place)  # the other ranks wait for this one
            raise
        tokens = autocast(tokens)
        # shared experts may run while rows travel
        beside = None if isinstance(self.shared, ResidualExperts | None) else Beside(partial(self.shared, tokens))
        if self.weights is None or self.weights.idle:
            y = self.dispatcher(tokens, plan, kept.weight, self.experts, beside)  # dispatch, experts, combine
        else:  # weights of some or all experts come here
            y = self.weights(self.dispatcher, tokens, plan, kept.weight, self.experts)
        if self.free is not None:
            y = y + self.free(tokens, routing.expert - self.num_experts, routing.weight)
        if isinstance(self.shared, ResidualExperts):
            y = self.shared(tokens, y)
        elif beside is not None:
            y = y + beside()
        if self.shared is not None and real is not None:  # routed experts leave zeros at padding, shared ones do not
            y = torch.where(real.unsqueeze(1), y, 0)
        y = y.to(x.dtype).reshape(x.shape)
        sent = at.sent(kept.expert, self.place) if isinstance(at := self.dispatcher, BoundedDispatcher) else kept.expert
        self._record(y, routing, None if sent is routed.expert else (routed.expert >= 0) & (sent < 0))
        return y

    def train(self, mode: bool = True) -> Self:
        """See `torch.nn.Module.train`. `place` keeps the mode as well, so that ranks can compare it."""
        if self.place is not None:
            self.place.training = mode
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._count.moved_by(fn)
        return super()._apply(fn, recurse)

    @property
    def top_k(self) -> int:
        """Number of experts k that a token picks. It may be set between steps."""
        return self.gate.top_k

    @top_k.setter
    def top_k(self, top_k: int) -> None:
        self.gate.top_k = top_k

    @property
    def capacity(self) -> Capacity | None:
        """The capacity rule, None if dropless. It may be set between steps; a number changes only its factor."""
        return self._capacity

    @capacity.setter
    def capacity(self, capacity: float | str | Capacity | None) -> None:
        self._capacity = Capacity.of(capacity, self._capacity)

    @property
    def balance(self) -> Balance:
        """The weights of auxiliary losses. They may be set between steps; a number changes only `Balance.weight`."""
        return self._loss.balance

    @balance.setter
    def balance(self, balance: float | Balance) -> None:
        self._loss = LayerLoss(Balance.of(balance, self.balance))

    @property
    def parallelism(self) -> int | None:
        """Tutel's r; 0 brings experts to tokens (`WeightTravel`). Set it between steps, or to "auto" (`Adaptive`)."""
        return None if self.weights is None else self.weights.parallelism

    @parallelism.setter
    def parallelism(self, parallelism: int | str) -> None:
        self.weights = chosen(self.weights, self.place, self.experts, parallelism=parallelism)

    @property
    def shadow(self) -> tuple[int, ...] | None:
        """Ids of experts that come to their tokens, or None. Set it between steps, or to "auto" (`Adaptive`)."""
        return None if self.weights is None else self.weights.shadow or None

    @shadow.setter
    def shadow(self, shadow: Sequence[int] | str | None) -> None:
        self.weights = chosen(self.weights, self.place, self.experts, shadow=() if shadow is None else shadow)

    @property
    def stats(self) -> Stats:
        """Load statistics of the last forward on this rank, as tensors on its device."""
        if self._last is None:
            raise RuntimeError(f"no statistics yet in {described(self)}: run a forward first")
        return Stats.of(*self._last, self._choices)

    @property
    def _choices(self) -> int:
        """Number of experts that the gate chooses among: the routed ones, and then the free ones."""
        return self.num_experts + (0 if self.free is None else len(self.free))

    def _check(self, x: Tensor, mask: Tensor | None, ids: Tensor | None, documents: Tensor | None) -> None:
        if x.ndim == 0 or x.shape[-1] != self.dim:
            given = f"{tuple(x.shape)} in {described(self)}"
            raise ValueError(f"x must be (..., {self.dim}), the last axis the model width; got {given}")
        if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(f"x must be float32, float64, bfloat16 or float16; got {x.dtype} in {described(self)}")
        inputs = ("mask", mask, torch.bool), ("ids", ids, torch.int64), ("documents", documents, torch.int64)
        for name, given, dtype in inputs:
            if given is not None and (given.shape != x.shape[:-1] or given.dtype != dtype):
                wanted = f"{str(dtype).removeprefix('torch.')} {tuple(x.shape[:-1])}"
                got = f"{given.dtype} {tuple(given.shape)} in {described(self)}"
                raise ValueError(f"{name} must be {wanted}; got {got}")
        if "sequence" in self.balance.shares and x.ndim < 2:
            wanted = f'Balance(over="sequence") needs x (..., S, {self.dim})'
            raise ValueError(f"{wanted}; got {tuple(x.shape)} in {described(self)}")

    def _route(self, tokens: Tensor, real: Tensor | None, ids: Tensor | None, given: Routing | None) -> Routing:
        """Ask the gate, unless a routing is given, and check the routing. Values are checked in the first forward."""
        more = {"mask": real} if self.gate.takes_mask else {}
        if self.gate.takes_ids:
            more["ids"] = None if ids is None else ids.flatten()
        routing = self.gate(tokens, **more) if given is None else given
        wrong = wrong_shapes(routing, len(tokens), self._choices)
        if wrong is None and self._loss.penalizes and routing.logits is None:
            wrong = "returns no logits, and Balance(z_loss=) needs the router's logits: set z_loss=0"
        if wrong is None and can_be_read(routing.expert) and (type(self.gate), self.training) not in self._checked:
            wrong = wrong_values(routing)  # one wait for the device
            if len(tokens):
                self._checked.add((type(self.gate), self.training))
        if wrong is not None:
            raise ValueError(f"{type(self.gate).__name__}, the gate of {described(self)}, {wrong}")
        routing = routing if real is None else routing.masked(real)
        return routing if self.tap is None else outside(self.tap, self.gate, tokens, routing)

    def _begin(self) -> None:
        """Free the losses of a step that has ended, except while compiling or in activation recomputation."""
        if torch.compiler.is_compiling() or in_backward():
            return
        if self.training and self._losses.forgotten:
            learns = any(p.requires_grad for p in self.gate.parameters())
            self._losses.warn_of_forgotten(described(self) if learns else None)
        self._losses.let_go()

    def _record(self, y: Tensor, routing: Routing, dropped: Tensor | None) -> None:
        """Keep routing, load and losses of this forward for `stats`, `load` and `aux_loss`."""
        group = self.balance_group if self.training else None
        loss = self._loss(routing, y.shape[:-2].numel(), group, self.sequence_group, self.gate.balances_itself)
        kept = routing.expert if dropped is None else torch.where(dropped, -1, routing.expert)
        self._last = (routing.expert, kept, routing.weight.detach())
        compiling = torch.compiler.is_compiling()
        if not compiling and in_backward():
            return  # activation recomputation: this forward has been counted
        if self.training and y.requires_grad:
            self.gate.observe(routing)
            self._count.add(routing.expert, dropped, routing.num_experts)
        step = self._losses.add(loss, self.training, y.requires_grad)
        if self.training and y.requires_grad and not compiling:  # without a hook, only `aux_loss` ends the step
            y.register_hook(lambda _: self._losses.after_backward(step))

    def __getstate__(self) -> dict[str, Any]:
        if self.dispatcher.groups or self.balance_group or self.sequence_group:
            raise TypeError(
                "a layer spread over ranks has process groups, which cannot be pickled: save model.state_dict(), or "
                "use turnout.models.checkpoint (copy.deepcopy works: the copy shares the groups)"
            )
        return self._state()

    def __deepcopy__(self, memo: dict[int, Any]) -> MoE:
        for module in self.modules():
            memo |= {id(value): value for value in vars(module).values() if isinstance(value, ProcessGroup)}
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__ = deepcopy(self._state(), memo)
        return copied

    def _state(self) -> dict[str, Any]:
        # Without losses, whose graph cannot be copied, and without what `compile` made of this layer.
        return {**super().__getstate__(), "_last": None, "_losses": StepLosses(), "tap": None}


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """The `MoE` layers of a model by name. A model that is itself a layer has the name ""."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
