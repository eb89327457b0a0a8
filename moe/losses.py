"""Losses that keep the experts evenly used, as functions of a routing.

All of them are made from the routing before capacity drops anything, leave padding out, and use the
number of experts on all ranks. A loss over several ranks is written for an objective that is the mean
over ranks (what DDP, FSDP and `sync_gradients` compute): add it on every rank.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..dispatch.collectives import all_reduce
from ..dispatch.plan import load
from .routing import Routing

BALANCE = ("local", "global", "sequence")


@dataclass(frozen=True)
class Balance:
    """How a layer is trained to use its experts evenly.

    Args:
        weight: weight of the load-balancing loss, and of losses that a gate computes itself; 0 adds none.
        over: the tokens over which the loss balances: ``"local"`` (this rank's forward, the default), ``"global"`` (all
            ranks that share the batch) or ``"sequence"`` (each sequence; x is then [..., S, D]). Several at once, each
            with its share of `weight`: ``{"global": 1.0, "sequence": 0.1}``.
        choices: how many of a token's k choices the loss counts. None, the default, counts all; 1 is GShard's
            definition.
        z_loss: weight of the router z-loss (ST-MoE, arXiv:2202.08906); 0, the default, adds none.

    Raises:
        TypeError, ValueError: an argument that does not fit, by its name.
    """

    weight: float = 0.01
    over: str | Mapping[str, float] = "local"
    choices: int | None = None
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        for name in ("weight", "z_loss"):
            _check_weight(name, weight := getattr(self, name))
            object.__setattr__(self, name, float(weight))  # 1 and 1.0 are the same to ranks that compare
        if isinstance(self.over, Mapping):
            object.__setattr__(self, "over", dict(self.over))  # the caller's may change
        shares = self.shares
        numbers = all(isinstance(share, int | float) and share >= 0 for share in shares.values())
        if not shares or not set(shares) <= set(BALANCE) or not numbers:
            raise ValueError(
                f"over must be one of {', '.join(BALANCE)}; got {self.over!r} (for several, a dict of shares, 0 or "
                "more)"
            )
        if self.choices is not None and (not isinstance(self.choices, int) or self.choices < 1):
            raise ValueError(f"choices must be a positive integer or None; got {self.choices!r}")

    @classmethod
    def of(cls, given: float | Balance, now: Balance | None = None) -> Balance:
        """What `MoE(balance=)` means: `given` itself, or a weight. The other fields of `now` stay.

        >>> Balance.of(0.1, now=Balance(over="global"))
        Balance(weight=0.1, over='global', choices=None, z_loss=0.0)
        """
        if isinstance(given, Balance):
            return given
        _check_weight("balance", given)
        return cls(given) if now is None else replace(now, weight=given)

    @property
    def shares(self) -> dict[str, float]:
        """Over which tokens the loss balances, with the share of the weight: "global" -> {"global": 1.0}."""
        return dict(self.over) if isinstance(self.over, Mapping) else {self.over: 1.0}


class LayerLoss:
    """The weighted losses of one forward, as a `Balance` says.

    Weights are tensors: to `torch.compile` a float is a constant, and every new value would be compiled again.
    """

    def __init__(self, balance: Balance) -> None:
        self.balance = balance
        self.weight, self.z_loss = _held(balance.weight), _held(balance.z_loss)
        self.parts = {over: _held(balance.weight * share) for over, share in balance.shares.items()}
        self.balances, self.penalizes = balance.weight > 0, balance.z_loss > 0

    def __call__(
        self,
        routing: Routing,
        sequences: int,
        group: ProcessGroup | None,
        split: ProcessGroup | None,
        balanced: bool = False,
    ) -> Tensor | None:
        """The sum, a scalar; None if there is nothing to add. `group` and `split` as in `balance_loss`.

        `balanced`: the gate balances itself, so only the losses of its own are added, and the z-loss.
        """
        group, losses = None if set(self.parts) == {"local"} else group, []
        if self.balances:
            losses += [(self.weight, mean_over_split(own, split)) for own in routing.losses.values()]
            if not balanced:
                counted = routing.first(self.balance.choices)
                for over, weight in self.parts.items():
                    losses.append((weight, balance_loss(counted, over, sequences, group, split)))
        if self.penalizes:
            losses.append((self.z_loss, z_loss(routing, group, split)))
        return torch.stack([weight[0].to(loss.dtype) * loss for weight, loss in losses]).sum() if losses else None


class StepLosses:
    """The losses of one layer's forwards, kept until `aux_loss` asks for them.

    A step is the training forwards up to their first backward or to `aux_loss`; the next training forward begins
    another. Training forwards without gradients add to a step that has begun but begin none: the next forward takes
    their place. An evaluation, which is a forward in eval mode, is kept beside the step and does not disturb it.
    """

    def __init__(self) -> None:
        self.step: list[Tensor] = []
        self.evaluation: list[Tensor] | None = None  # of the last forward, if that was an evaluation
        self.under_way = False  # the step has forwards with a graph, and is not over
        self.forgotten = False  # a backward ran before anything had asked for the losses
        self.warned = False

    def add(self, loss: Tensor | None, training: bool, differentiable: bool) -> list[Tensor]:
        """Keep the loss of a forward, whose output is `differentiable` or not; returns the step as it is now."""
        losses = [] if loss is None else [loss]
        self.evaluation = None if training else losses
        if training and self.under_way:
            self.step.extend(losses)
        elif training:
            self.step, self.under_way = losses, differentiable
        return self.step

    def ask(self, training: bool, keep: bool) -> tuple[list[Tensor], bool]:
        """The losses of the step under way in training mode, else of the last forward; is that an evaluation's?

        `keep=False`: let go of them.
        """
        if self.evaluation is not None and not (training and self.under_way):
            losses = self.evaluation
            self.evaluation = losses if keep else []
            return losses, bool(losses)
        losses = list(self.step)
        self.under_way = self.forgotten = False
        if not keep:
            self.step.clear()
        return losses, False

    def after_backward(self, step: list[Tensor]) -> None:
        """A backward went through an output of `step`, which is over now."""
        if step is self.step and self.under_way:
            self.under_way = False
            self.forgotten = any(loss.requires_grad for loss in step)

    def let_go(self) -> None:
        """Free the graph of a step that is over: it would tie the next step to its CUDA stream."""
        self.evaluation = None
        if not self.under_way:
            self.step.clear()  # in place: the hooks of its outputs hold it, too

    def warn_of_forgotten(self, layer: str | None) -> None:
        """Warn, once, that the last step left out the losses of `layer`; None: there is nothing to warn of."""
        if layer is not None and not self.warned:
            self.warned = True
            warnings.warn(
                f"the balance loss of {layer} was left out of the last step: its backward ran, and nothing had called "
                "aux_loss(model). Add it once a step, loss = task_loss + aux_loss(model); to train without it, set "
                "layer.balance = Balance(weight=0)",
                stacklevel=2,
            )
        self.forgotten = False


def balance_loss(
    routing: Routing,
    over: str = "local",
    sequences: int = 1,
    group: ProcessGroup | None = None,
    split: ProcessGroup | None = None,
) -> Tensor:
    """E * sum_e f_e P_e: 1 when tokens are spread evenly, E when all go to one expert.

    f_e is the share of assignments expert e received, P_e the mean of its scores, each token's scores
    summing to 1 (Switch Transformer, arXiv:2101.03961, eq. 4-6; with `routing.first(1)`, so that f counts first choices
    alone, GShard, arXiv:2006.16668). The gradient flows through P. f * P is not linear, so it matters over which tokens
    both are taken:

    Args:
        routing: of this rank's tokens.
        over: ``"local"``: the tokens of `split`; changes with the number of ranks. ``"global"``: all tokens
            of all ranks of `group`, too (arXiv:2501.11873). ``"sequence"``: one term per sequence, averaged
            over the sequences of all ranks (DeepSeek-V3, arXiv:2412.19437, eq. 17-20). The last two do not
            depend on how tokens are spread over ranks.
        sequences: sequences on this rank; T is a multiple, tokens of one lying together.
        group: the ranks that share the batch; None is this rank alone.
        split: the ranks that have parts of the same sequences, of equal length, and whose gradients are summed;
            None is this rank alone.

    Returns:
        A scalar, equal on all ranks of `split`, and for "global" on all; on a rank without tokens 0 for "local".
    """
    if over not in BALANCE:
        raise ValueError(f"over must be one of {', '.join(BALANCE)}; got {over!r}")
    if over != "sequence":
        sequences = 1
    E = routing.num_experts
    total = routing.scores.sum(-1, keepdim=True).clamp(min=torch.finfo(routing.scores.dtype).tiny)
    scores = routing.scores * total.reciprocal()  # the backward of a division takes three more matrices [T, E]
    if routing.mask is not None:
        scores = torch.where(routing.mask.unsqueeze(1), scores, 0)
    # without tokens: zeros that keep their graph, for this rank takes part as well
    mass = scores.reshape(sequences, -1, E).sum(1) if len(scores) else scores.sum(0).expand(sequences, E)
    chosen = _load_by_sequence(routing, sequences).to(mass.dtype)
    tokens = _tokens_by_sequence(routing, sequences).to(mass.dtype)
    if split is not None or over == "global":
        sums = _sum(torch.cat([mass, chosen, tokens.unsqueeze(1)], 1), split, averaged=False)
        sums = _sum(sums, group if over == "global" else None)
        mass, chosen, tokens = sums[:, :E], sums[:, E:-1], sums[:, -1]
    share = (chosen / chosen.sum(1, keepdim=True).clamp(min=1)).detach()
    terms = E * (share * mass).sum(1) / tokens.clamp(min=1)
    if over != "sequence":
        return terms.sum()
    counted = tokens > 0
    return _mean_over_ranks(torch.where(counted, terms, 0).sum(), counted.sum().to(terms.dtype), group)


def z_loss(routing: Routing, group: ProcessGroup | None = None, split: ProcessGroup | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2: keeps router logits small (ST-MoE, arXiv:2202.08906, eq. 5).

    With a `group`, or `split`, over the tokens of all their ranks; both as in `balance_loss`.
    """
    if routing.logits is None:
        raise ValueError("z_loss needs the router's logits, and this routing has none")
    terms = routing.logits.logsumexp(-1).square()
    counted = torch.ones_like(terms, dtype=torch.bool) if routing.mask is None else routing.mask
    sums = torch.stack([torch.where(counted, terms, 0).sum(), counted.sum().to(terms.dtype)])
    total, number = _sum(sums, split, averaged=False)
    return _mean_over_ranks(total, number, group)


def cv_squared(amount: Tensor) -> Tensor:
    """Squared coefficient of variation of amounts [E], variance / mean^2: 0 when even, E - 1 when one has all.

    Of importance or load (Shazeer et al. 2017, arXiv:1701.06538, eq. 7 and 11); over this rank's tokens,
    so it changes with the number of ranks. Nothing at all is even.
    """
    mean = amount.mean()
    return ((amount - mean) / mean.clamp(min=torch.finfo(amount.dtype).tiny)).square().mean()


def mean_over_split(loss: Tensor, split: ProcessGroup | None) -> Tensor:
    """The mean of a scalar over ranks whose gradients are summed."""
    return loss if split is None else _sum(loss, split, averaged=False) / dist.get_world_size(split)


def _mean_over_ranks(total: Tensor, number: Tensor, group: ProcessGroup | None) -> Tensor:
    """This rank's part of a mean, of its sum of `number` terms: the mean over ranks of the parts is that mean."""
    size = 1
    if group is not None:
        number, size = _sum(number, group), dist.get_world_size(group)
    return total * size / number.clamp(min=1)


def _sum(x: Tensor, group: ProcessGroup | None, averaged: bool = True) -> Tensor:
    return x if group is None else all_reduce(x, group, averaged)


def _load_by_sequence(routing: Routing, sequences: int) -> Tensor:
    """Assignments per sequence and expert, int64 [sequences, E]."""
    E = routing.num_experts
    if sequences == 1:
        return load(routing.expert, E).unsqueeze(0)
    # not repeat_interleave: for torch 2.11's compiler its number of repeats is a constant
    sequence = torch.arange(sequences, device=routing.expert.device).unsqueeze(1)
    sequence = sequence.expand(-1, len(routing.expert) // max(sequences, 1)).flatten()
    ids = torch.where(routing.expert < 0, -1, routing.expert + E * sequence.unsqueeze(1))
    return load(ids, sequences * E).reshape(sequences, E)


def _tokens_by_sequence(routing: Routing, sequences: int) -> Tensor:
    """Tokens of each sequence that are not padding, [sequences]."""
    if routing.mask is not None:
        return routing.mask.reshape(sequences, -1).sum(1) if len(routing.mask) else routing.mask.new_zeros(sequences)
    return torch.full((sequences,), len(routing.scores) // max(sequences, 1), device=routing.scores.device)


def _held(weight: float) -> Tensor:
    # [1], not a scalar: torch.compile traces a graph twice that has a float64 scalar as an input (torch 2.13)
    return torch.tensor([weight], dtype=torch.float64, device="cpu")


def _check_weight(name: str, weight: float) -> None:
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise TypeError(f"{name} must be a number, 0 or more; got {weight!r}")
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{name} must be a number, 0 or more; got {weight!r}")
