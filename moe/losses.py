"""Auxiliary losses of the router: the load-balancing loss and the router z-loss.

They are computed from the routing before capacity drops any assignment, without padding tokens, and with the number of
experts on all ranks. Training takes the mean over ranks (DDP, FSDP and `sync_gradients` do), and a loss over several
ranks is scaled for that mean: add it on every rank.
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
from .by_document import sums_by_document
from .routing import Routing

BALANCE = ("local", "global", "sequence")


@dataclass(frozen=True)
class Balance:
    """Weights of a layer's load-balancing loss and router z-loss, and the tokens that are balanced.

    Args:
        weight: weight of the load-balancing loss, and of losses that a gate computes itself; 0.01 by default, 0 adds
            none.
        over: tokens that the loss balances: ``"local"`` (this rank's forward, the default), ``"global"`` (all ranks
            that share the batch) or ``"sequence"`` (each sequence or document by itself; x is then [..., S, D]). A dict
            takes several at once, each with its share of `weight`: ``{"global": 1.0, "sequence": 0.1}``.
        choices: number of a token's k choices that the loss counts, first ones first. None, the default, counts all,
            and 1 is GShard's definition.
        z_loss: weight of the router z-loss (ST-MoE, arXiv:2202.08906); 0, the default, adds none.

    Raises:
        TypeError, ValueError: an argument that does not fit. The message names it.

    >>> Balance(0.01, over={"global": 1.0, "sequence": 0.1}, z_loss=1e-3).shares
    {'global': 1.0, 'sequence': 0.1}
    """

    weight: float = 0.01
    over: str | Mapping[str, float] = "local"
    choices: int | None = None
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        for name in ("weight", "z_loss"):
            _check_weight(name, weight := getattr(self, name))
            object.__setattr__(self, name, float(weight))  # ranks compare settings, and 1 must equal 1.0
        if isinstance(self.over, Mapping):
            object.__setattr__(self, "over", dict(self.over))  # the caller may change its own dict later
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
        """The `Balance` for ``balance=given``: a number is a weight, and the other fields come from `now`.

        >>> Balance.of(0.1, now=Balance(over="global"))
        Balance(weight=0.1, over='global', choices=None, z_loss=0.0)
        """
        if isinstance(given, Balance):
            return given
        _check_weight("balance", given)
        return cls(given) if now is None else replace(now, weight=given)

    @property
    def shares(self) -> dict[str, float]:
        """Share of `weight` for each kind of tokens in `over`: "global" gives {"global": 1.0}."""
        return dict(self.over) if isinstance(self.over, Mapping) else {self.over: 1.0}


class LayerLoss:
    """Computes the weighted sum of one layer's auxiliary losses, by the rule of a `Balance`.

    Weights are tensors because `torch.compile` treats a float as a constant and compiles again for each new value.
    """

    def __init__(self, balance: Balance) -> None:
        self.balance = balance
        self.weight, self.z_loss = _weight_tensor(balance.weight), _weight_tensor(balance.z_loss)
        self.parts = {over: _weight_tensor(balance.weight * share) for over, share in balance.shares.items()}
        self.balances, self.penalizes = balance.weight > 0, balance.z_loss > 0

    def __call__(
        self,
        routing: Routing,
        sequences: int,
        group: ProcessGroup | None,
        split: ProcessGroup | None,
        balanced: bool = False,
    ) -> Tensor | None:
        """The weighted sum, a scalar, or None if no loss applies; arguments as in `balance_loss`.

        `balanced`: the gate balances itself, so that the load-balancing loss is left out.
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
        terms = [weight[0].to(loss.dtype) * loss for weight, loss in losses]
        return torch.stack(terms).sum() if len(terms) > 1 else terms[0] if terms else None


class StepLosses:
    """The losses of one layer's forwards, kept until `aux_loss` asks for them.

    A step is all training forwards up to their first backward, or up to `aux_loss`. The next training forward starts
    a new step. A training forward without gradients adds to a step that has begun. If none has begun, its loss is kept
    only until the next forward. The loss of a forward in eval mode is kept beside the step and does not change it.
    """

    def __init__(self) -> None:
        self.step: list[Tensor] = []
        self.evaluation: list[Tensor] | None = None  # losses of the last forward if it ran in eval mode
        self.under_way = False  # the step has a forward with a graph, and has not ended
        self.forgotten = False  # a backward ran, and `aux_loss` had not been called
        self.warned = False

    def add(self, loss: Tensor | None, training: bool, differentiable: bool) -> list[Tensor]:
        """Keep the loss of a forward and return the step's losses. `differentiable`: its output has a graph."""
        losses = [] if loss is None else [loss]
        self.evaluation = None if training else losses
        if training and self.under_way:
            self.step.extend(losses)
        elif training:
            self.step, self.under_way = losses, differentiable
        return self.step

    def ask(self, training: bool, keep: bool) -> tuple[list[Tensor], bool]:
        """Losses for `aux_loss`, and whether they come from a forward in eval mode. This ends the step.

        They are the step's losses in training mode, and the last forward's otherwise. ``keep=False`` frees them.
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
        """End `step`, because a backward has gone through one of its outputs."""
        if step is self.step and self.under_way:
            self.under_way = False
            self.forgotten = any(loss.requires_grad for loss in step)

    def let_go(self) -> None:
        """Free the loss graph of a step that has ended: it would tie the next step to its CUDA stream."""
        self.evaluation = None
        if not self.under_way:
            self.step.clear()  # in place, because the backward hooks of its outputs hold the same list

    def warn_of_forgotten(self, layer: str | None) -> None:
        """Warn, once, that the last step left out the losses of the layer called `layer`. None gives no warning."""
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
    """Load-balancing loss E * sum_e f_e P_e: 1 when tokens are spread evenly, E when all go to one expert.

    f_e is the share of assignments that expert e received. P_e is the mean of its scores, with each token's scores
    scaled to sum to 1. The gradient flows through P only. `over` chooses the tokens over which f and P are taken,
    and their product depends on that.

    Args:
        routing: router output for this rank's tokens. With `routing.first(1)`, f counts first choices alone (GShard).
        over: ``"local"``, the default: the tokens of `split`. The value depends on the number of ranks.
            ``"global"``: the tokens of all ranks of `group` and `split`. ``"sequence"``: the mean over sequences, or
            over `Routing.documents` by their share of all tokens, masked or not. The last two do not depend on ranks.
        sequences: number of sequences on this rank. It divides T, and the tokens of a sequence are adjacent.
        group: ranks that share the batch. None, the default, is this rank alone.
        split: ranks that hold equally long parts of the same sequences, and whose gradients are summed. None, the
            default, is this rank alone.

    Returns:
        A scalar, equal on all ranks of `split`, and for "global" on all ranks. "local" gives 0 without tokens.

    References:
        Switch Transformer, arXiv:2101.03961, eq. 4-6. GShard, arXiv:2006.16668. Global: arXiv:2501.11873.
        Sequence: DeepSeek-V3, arXiv:2412.19437, eq. 17-20.

    >>> balance_loss(Routing(torch.tensor([[0], [1]]), torch.ones(2, 1), torch.eye(2)))
    tensor(1.)
    """
    if over not in BALANCE:
        raise ValueError(f"over must be one of {', '.join(BALANCE)}; got {over!r}")
    sequences = sequences if over == "sequence" else 1
    E = routing.num_experts
    scores = routing.scores
    if not routing.normalized:
        total = scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        scores = scores * total.reciprocal()  # the backward of a division needs three more [T, E] matrices
    if routing.mask is not None:
        scores = torch.where(routing.mask.unsqueeze(1), scores, 0)
    if over == "sequence" and routing.documents is not None:
        mass, chosen, tokens = sums_by_document(routing, scores, split)
    else:
        mass, chosen, tokens = _sums_by_sequence(routing, scores, sequences)
    if split is not None or over == "global":
        sums = _sum(torch.cat([mass, chosen, tokens.unsqueeze(1)], 1), split, averaged=False)
        sums = _sum(sums, group if over == "global" else None)
        mass, chosen, tokens = sums[:, :E], sums[:, E:-1], sums[:, -1]
    share = (chosen / chosen.sum(1, keepdim=True).clamp(min=1)).detach()
    terms = (E * share / tokens.clamp(min=1).unsqueeze(1) * mass).sum(1)
    if over != "sequence":
        return terms.squeeze(0)
    weight = tokens if routing.documents is not None else (tokens > 0).to(terms.dtype)
    number = weight.sum() if routing.documents is None else tokens.new_full((), len(tokens))  # masked ones as well
    return _mean_over_ranks((weight * terms).sum(), number, group)


def z_loss(routing: Routing, group: ProcessGroup | None = None, split: ProcessGroup | None = None) -> Tensor:
    """Router z-loss, which keeps logits small: the mean over tokens of logsumexp(logits)^2 (arXiv:2202.08906, eq. 5).

    The mean is over the tokens of all ranks of `group` and `split` (see `balance_loss`). A routing without logits
    raises ValueError.
    """
    if routing.logits is None:
        raise ValueError("z_loss needs router logits, and routing.logits is None: return logits from the gate")
    terms = routing.logits.logsumexp(-1).square()
    counted = torch.ones_like(terms, dtype=torch.bool) if routing.mask is None else routing.mask
    own = [torch.where(counted, terms, 0).sum(), counted.sum().to(terms.dtype)]
    total, number = _sum(torch.stack(own), split, averaged=False).unbind()
    return _mean_over_ranks(total, number, group)


def cv_squared(amount: Tensor) -> Tensor:
    """Squared coefficient of variation of amounts [E], variance / mean^2: 0 if even, E - 1 if one expert has all.

    All zeros give 0. Amounts are one rank's importance or load (Shazeer et al. 2017, arXiv:1701.06538, eq. 7 and 11),
    so the value depends on the number of ranks.
    """
    mean = amount.mean()
    return ((amount - mean) / mean.clamp(min=torch.finfo(amount.dtype).tiny)).square().mean()


def mean_over_split(loss: Tensor, split: ProcessGroup | None) -> Tensor:
    """Mean of a scalar over the ranks of `split`, whose gradients are summed."""
    return loss if split is None else _sum(loss, split, averaged=False) / dist.get_world_size(split)


def _mean_over_ranks(total: Tensor, number: Tensor, group: ProcessGroup | None) -> Tensor:
    """`total`, the sum of this rank's `number` terms, scaled so that its mean over ranks is the mean of all terms."""
    size = 1
    if group is not None:
        number, size = _sum(number, group), dist.get_world_size(group)
    return total * size / number.clamp(min=1)


def _sum(x: Tensor, group: ProcessGroup | None, averaged: bool = True) -> Tensor:
    return x if group is None else all_reduce(x, group, averaged)


def _sums_by_sequence(routing: Routing, scores: Tensor, sequences: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [sequences, E], assignments [sequences, E] and real tokens [sequences], summed, in the scores' dtype."""
    E, mask, expert = routing.num_experts, routing.mask, routing.expert
    length = len(scores) // max(sequences, 1)
    # a rank without tokens takes part with zeros that have a graph
    mass = scores.reshape(sequences, -1, E).sum(1) if len(scores) else scores.sum(0).expand(sequences, E)
    if sequences != 1:
        # not repeat_interleave: torch 2.11's compiler treats its number of repeats as a constant
        sequence = torch.arange(sequences, device=expert.device).unsqueeze(1).expand(-1, length).flatten()
        expert = torch.where(expert < 0, -1, expert + E * sequence.unsqueeze(1))
    chosen = load(expert, sequences * E).reshape(sequences, E)
    if mask is not None and len(mask):
        tokens = mask.reshape(sequences, -1).sum(1).to(scores.dtype)
    else:
        tokens = scores.new_full((sequences,), length)
    return mass, chosen.to(scores.dtype), tokens


def _weight_tensor(weight: float) -> Tensor:
    # [1], not a scalar: torch.compile traces a graph with a float64 scalar input twice (torch 2.13)
    return torch.tensor([weight], dtype=torch.float64, device="cpu")


def _check_weight(name: str, weight: float) -> None:
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise TypeError(f"{name} must be a number, 0 or more; got {weight!r}")
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{name} must be a number, 0 or more; got {weight!r}")
