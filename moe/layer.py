"""The layer. `MoE.forward` is a token's trip, from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..dispatch.dispatcher import Dispatcher
from ..dispatch.local import LocalDispatcher
from ..dispatch.place import Place
from ..dispatch.plan import Plan
from ..dispatch.torch_internals import in_backward
from .build import called, named_experts, named_gate, named_shared
from .capacity import POLICIES, capacity, capacity_limit, factor_of
from .experts.base import Experts
from .experts.shared import Residual
from .experts.zero_computation import FreeExperts
from .gates import Gate
from .losses import StepLosses, balance_loss, balance_shares, mean_over_split, z_loss
from .routing import Routing, can_be_read, wrong_shapes, wrong_values
from .stats import LoadCount, Stats


class MoE(nn.Module):
    """Mixture of experts: each token goes to k of E networks and comes back as their weighted sum.

    Drop it in where a feed-forward block was: x (..., D) -> y (..., D) in the same dtype, nothing else.
    The balance loss is collected by `aux_loss(model)`; a layer warns once if a training step leaves it out. One
    process holds all experts until `parallelize(model, mesh)` spreads them; nothing else changes then.

    Args:
        dim: model width D.
        hidden: hidden width H of each expert.
        num_experts: experts on all ranks together, E.
        top_k: experts a token picks, k; None: what the gate picks by itself (switch, sinkhorn, base, random and
            hash 1, others 2).
        gate: ``"topk"``, ``"switch"``, ``"gshard"``, ``"noisy_topk"``, ``"hierarchical"``, ``"sigmoid"`` (needs
            `balance_biases` after each step), ``"expert_choice"`` (not causal), ``"cosine"``, ``"sinkhorn"``,
            ``"base"``, ``"random"``, ``"hash"`` (needs `ids`), or a `Gate` of your own.
        experts: an activation by name (``"swiglu"``, ``"geglu"``, ``"gelu"``, ``"relu"``, ``"relu2"``, and others of
            `moe.activation.ACTIVATIONS`); or a factory ``() -> nn.Module``, [n, D] -> [n, D], whose modules differ in
            values of parameters and buffers alone (`ModuleExperts`); or `Experts` of your own. The last two do not
            look at `hidden`.
        capacity_factor: None: no token is dropped. A number: an expert takes at most
            ceil(capacity_factor * k * T / E) of a rank's T tokens (`capacity_limit`; padding counts as a token there).
        eval_capacity_factor: the same in eval mode; None: as in training.
        min_capacity: what an expert may take at least, where there is a capacity factor.
        drop_policy: who is dropped, ``"score"``, ``"position"`` or ``"priority"`` (`capacity`).
        pad: give every expert its full capacity, so that all shapes are static; needs capacity factors.
        shared_experts: experts that every token visits as well; or a module, [T, D] -> [T, D], that stands for them.
        residual: weigh these against the others by a learned softmax for each token (DeepSpeed's form of PR-MoE,
            arXiv:2201.05596), in place of a plain sum.
        bias: biases in the named experts.
        balance: over which tokens the losses balance: ``"local"``, ``"global"``, ``"sequence"`` (`balance_loss`), or
            several, ``{"global": 1.0, "sequence": 0.1}``, each with its share of `aux_loss_weight`. For "sequence",
            x is [..., S, D]. Gates with losses of their own instead (noisy_topk) take this rank's tokens.
        balance_choices: how many of a token's choices the balance loss counts; None: all. 1 is GShard's definition.
        aux_loss_weight, z_loss_weight: weights of the balance loss and of the router's z-loss; a gate's
            own losses have the weight of the balance loss.
        free_experts: kinds of further ones that cost nothing, ``"null"``, ``"identity"``, ``"constant"``
            (`FreeExperts`); the gate chooses among all.
        weight_on: the gate's weight multiplies an expert's ``"output"``, or its ``"input"``, as in Llama 4.
        seed: of the experts' initial values, the same on all ranks; None draws one from torch's default generator.

    Raises:
        ValueError, TypeError: arguments or inputs that do not fit, saying which.
        DispatchError: ranks that disagree, or NaN among the gate's weights; on every rank.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        top_k: int | None = None,
        gate: str | Gate = "topk",
        experts: str | Callable[[], nn.Module] | Experts = "swiglu",
        capacity_factor: float | None = None,
        drop_policy: str = "score",
        pad: bool = False,
        shared_experts: int | nn.Module = 0,
        bias: bool = False,
        balance: str | Mapping[str, float] = "local",
        eval_capacity_factor: float | None = None,
        seed: int | None = None,
        aux_loss_weight: float = 1e-2,
        z_loss_weight: float = 0.0,
        free_experts: Sequence[str] = (),
        weight_on: str = "output",
        residual: bool = False,
        min_capacity: int = 1,
        balance_choices: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "hidden": hidden, "num_experts": num_experts, "min_capacity": min_capacity}
        sizes["balance_choices"] = 1 if balance_choices is None else balance_choices
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer; got {size!r}")
        if drop_policy not in POLICIES:
            raise ValueError(f"drop_policy must be one of {', '.join(POLICIES)}; got {drop_policy!r}")
        balance_shares(balance)
        if pad and capacity_factor is None:
            raise ValueError("pad=True gives every expert its full capacity: set capacity_factor as well")
        seed = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed

        self.dim, self.num_experts = dim, num_experts
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.drop_policy, self.pad, self.min_capacity = drop_policy, pad, min_capacity
        self.balance, self.balance_choices = balance, balance_choices
        self.aux_loss_weight, self.z_loss_weight = aux_loss_weight, z_loss_weight
        self.gate = named_gate(gate, dim, num_experts + len(free_experts), top_k)
        self.experts = named_experts(experts, dim, hidden, num_experts, bias, seed)
        self.experts.weight_on = weight_on
        self.shared = named_shared(experts, dim, hidden, shared_experts, bias, residual)
        self.free = FreeExperts(free_experts, dim) if free_experts else None
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.place: Place | None = None  # among the layers of its model
        self.balance_group: ProcessGroup | None = None  # the ranks that share the batch; `parallelize` sets all three
        self.sequence_group: ProcessGroup | None = None  # those that have parts of the same sequences
        self._last: tuple[Tensor, Tensor, Tensor] | None = None
        self._losses, self._count = StepLosses(), LoadCount(self._choices)
        self._checked: set[tuple[type, bool]] = set()  # gates whose first routing was looked at, in training and eval

    capacity_factor = factor_of("_capacity")  # these may be set between steps
    eval_capacity_factor = factor_of("_eval_capacity")

    def forward(self, x: Tensor, mask: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """x (..., D) -> y (..., D), same dtype.

        `mask`: bool (...), False = padding, which goes to no expert, shared ones included, whatever stands in it: y
        and the gradient of x are zero there. `ids`: int64 (...), for gates that route by token id; others ignore them.
        """
        try:
            self._begin()
            self._check(x, mask, ids)
            real = None if mask is None else mask.flatten()
            tokens = rearrange(x, "... d -> (...) d")
            if real is not None:  # padding may hold anything: zeros keep NaN out of all that follows, and its gradients
                tokens = torch.where(real.unsqueeze(1), tokens, 0)
            routing = self._route(tokens, real, ids)  # who goes where
            routed = routing if self.free is None else routing.keep(routing.expert < self.num_experts)
            limit = self._limit(routing)
            kept = routed if limit is None else capacity(routed, limit, self.drop_policy)  # drop those over capacity
            # which token fills which row
            plan = Plan.of(kept.expert, self.num_experts, limit if self.pad else None, self.place)
        except Exception:
            self.dispatcher.refuse(self.num_experts, x.device, self.place)  # the other ranks wait for this one
            raise
        tokens = _autocast(tokens)
        y = self.dispatcher(tokens, plan, kept.weight, self.experts)  # there, through the experts, and back
        if self.free is not None:
            y = y + self.free(tokens, routing.expert - self.num_experts, routing.weight)
        if isinstance(self.shared, Residual):
            y = self.shared(tokens, y)
        elif self.shared is not None:
            y = y + self.shared(tokens)
        if self.shared is not None and real is not None:  # the others leave zeros there
            y = torch.where(real.unsqueeze(1), y, 0)
        y = y.to(x.dtype).reshape(x.shape)
        self._record(y, routing, None if limit is None else (routed.expert >= 0) & (kept.expert < 0))
        return y

    def train(self, mode: bool = True) -> Self:
        """See `torch.nn.Module.train`; its place knows of it, too, for ranks to compare."""
        if self.place is not None:
            self.place.training = mode
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._count.moved_by(fn)
        return super()._apply(fn, recurse)

    @property
    def top_k(self) -> int:
        """Experts a token picks, k; may be set between steps."""
        return self.gate.top_k

    @top_k.setter
    def top_k(self, top_k: int) -> None:
        self.gate.top_k = top_k

    @property
    def weight_on(self) -> str:
        """See `Experts`."""
        return self.experts.weight_on

    @property
    def recompute(self) -> bool:
        """See `Experts`."""
        return self.experts.recompute

    @recompute.setter
    def recompute(self, recompute: bool) -> None:
        self.experts.recompute = recompute

    @property
    def stats(self) -> Stats:
        """Load statistics of the last forward on this rank, as tensors on its device."""
        if self._last is None:
            raise RuntimeError("no statistics yet: they are of the last forward, and there was none")
        return Stats.of(*self._last, self._choices)

    @property
    def _choices(self) -> int:
        """What the gate chooses among: the experts, and then those that are free."""
        return self.num_experts + (0 if self.free is None else len(self.free))

    def _check(self, x: Tensor, mask: Tensor | None, ids: Tensor | None) -> None:
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (..., {self.dim}), the last axis the model width; got {tuple(x.shape)}")
        if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(f"x must be float32, float64, bfloat16 or float16; got {x.dtype}")
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
            raise ValueError(f"mask must be bool {tuple(x.shape[:-1])}; got {mask.dtype} {tuple(mask.shape)}")
        if ids is not None and (ids.shape != x.shape[:-1] or ids.dtype != torch.int64):
            raise ValueError(f"ids must be int64 {tuple(x.shape[:-1])}; got {ids.dtype} {tuple(ids.shape)}")
        if "sequence" in self.balance and x.ndim < 2:
            raise ValueError(f'balance="sequence" needs x (..., S, {self.dim}); got {tuple(x.shape)}')

    def _route(self, tokens: Tensor, real: Tensor | None, ids: Tensor | None) -> Routing:
        """Ask the gate; its answer is checked, its values once."""
        more = {"mask": real} if self.gate.takes_mask else {}
        if self.gate.takes_ids:
            more["ids"] = None if ids is None else ids.flatten()
        routing = self.gate(tokens, **more)
        wrong = wrong_shapes(routing, len(tokens), self._choices)
        if wrong is None and can_be_read(routing.expert) and (type(self.gate), self.training) not in self._checked:
            wrong = wrong_values(routing)  # one wait for the device
            if len(tokens):
                self._checked.add((type(self.gate), self.training))
        if wrong is not None:
            raise ValueError(f"{type(self.gate).__name__}, the gate of {described(self)}, {wrong}")
        return routing if real is None else routing.masked(real)

    def _limit(self, routing: Routing) -> int | None:
        """Rows an expert takes from this rank, None if any number."""
        factor = (None if self.training else self.eval_capacity_factor) or self.capacity_factor
        T, E = len(routing.expert), self.num_experts
        return None if factor is None else capacity_limit(factor, self.top_k, T, E, self.min_capacity)

    def _begin(self) -> None:
        """Let go of a step that is over; not while compiling, nor in a backward that computes activations again."""
        if torch.compiler.is_compiling() or in_backward():
            return
        if self.training and self._losses.forgotten:
            learns = any(p.requires_grad for p in self.gate.parameters())
            self._losses.warn_of_forgotten(described(self) if learns else None)
        self._losses.let_go()

    def _record(self, y: Tensor, routing: Routing, dropped: Tensor | None) -> None:
        """Keep what `stats`, `load` and `aux_loss` will be asked for."""
        loss = self._loss(routing, sequences=y.shape[:-2].numel())
        kept = routing.expert if dropped is None else torch.where(dropped, -1, routing.expert)
        self._last = (routing.expert, kept, routing.weight.detach())
        compiling = torch.compiler.is_compiling()
        if not compiling and in_backward():
            return  # activation recomputation: this forward has been counted
        if self.training and y.requires_grad:
            self.gate.observe(routing)
            self._count.add(routing.expert, dropped, routing.num_experts)
        step = self._losses.add(loss, self.training, y.requires_grad)
        if self.training and y.requires_grad and not compiling:  # compiled, `aux_loss` alone tells steps apart
            y.register_hook(lambda _: self._losses.after_backward(step))

    def _loss(self, routing: Routing, sequences: int) -> Tensor | None:
        """The weighted losses of one forward."""
        shares = balance_shares(self.balance)
        group = self.balance_group if self.training and set(shares) != {"local"} else None
        split, losses = self.sequence_group, []
        if self.aux_loss_weight:
            terms = [mean_over_split(own, split) for own in routing.losses.values()]
            if not self.gate.balances_itself:
                counted = routing.first(self.balance_choices)
                terms += [part * balance_loss(counted, over, sequences, group, split) for over, part in shares.items()]
            losses += [self.aux_loss_weight * term for term in terms]
        if self.z_loss_weight:
            losses.append(self.z_loss_weight * z_loss(routing, group, split))
        return torch.stack(losses).sum() if losses else None

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
        # What can be copied: not a loss with its graph, nor what `compile` made of this very layer.
        return {**super().__getstate__(), "_last": None, "_losses": StepLosses()}


def described(layer: MoE) -> str:
    """The layer as messages name it."""
    sizes = f"MoE(dim={layer.dim}, num_experts={layer.num_experts})"
    return sizes if layer.place is None else f"{called(layer.place.name)}, {sizes}"


def _autocast(tokens: Tensor) -> Tensor:
    """In autocast's dtype where it is on, so that fewer bytes travel and experts compute in it."""
    if torch.is_autocast_enabled(tokens.device.type) and tokens.dtype != torch.float64:
        return tokens.to(torch.get_autocast_dtype(tokens.device.type))
    return tokens
