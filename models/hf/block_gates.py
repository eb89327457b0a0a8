"""Gates that call a family's own router."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...dispatch.reorder import wide
from ...moe.gates.gate import Gate, chosen_scores
from ...moe.gates.router import SCORES
from ...moe.routing import Routing


class RouterGate(Gate):
    """Calls a family's own router, and returns its choice as a `Routing`.

    The router keeps its weights, its precision and its noise. So the choice is the original's to the last bit, and
    hooks that record router logits go on doing so. For a router with other results, derive from this class and write
    `choose`.

    Args:
        router: module x [T, D] -> logits [T, E], weight [T, k], expert int64 [T, k].
        weight: weight [E, D] of the router's projection.
        top_k: number of experts k that a token picks. It may change if the router has a `top_k` and `changes_k` is
            True.
        score: how logits become scores, ``"softmax"`` (the default) or ``"sigmoid"``. Statistics use them, and the
            layer's balance loss if `MoE.balance` is set.
    """

    learned = False  # the router has the weight
    changes_k = True  # whether the router obeys its `top_k`

    def __init__(self, router: nn.Module, weight: Tensor, top_k: int, score: str = "softmax") -> None:
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}; got {score!r}")
        experts, dim = weight.shape
        super().__init__(dim, experts, top_k)
        self.router, self.score = router, score

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Call the router: x [T, D] -> logits [T, E], weight [T, k], expert int64 [T, k], -1 for a dropped choice."""
        return self.router(x)

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x [T, D]. A router with multiplicative noise may write to x, as in the family's block."""
        return self._routing(*self.choose(x))

    def _routing(self, logits: Tensor, weight: Tensor, expert: Tensor) -> Routing:
        logits = wide(logits)
        scores = logits.sigmoid() if self.score == "sigmoid" else logits.softmax(-1)
        return Routing(expert, wide(weight), scores, logits)

    def weigh(self, routing: Routing, expert: Tensor) -> Tensor:
        """See `Gate.weigh`. The rule of the family is found from its own weights, with a host sync.

        Raises:
            TypeError: the family's weights are neither scores nor normalised scores, times a factor.
        """
        for normalize in (False, True):
            own = chosen_scores(routing.scores, routing.expert, normalize)
            ratio = (routing.weight / own).detach()[routing.expert >= 0]
            if not len(ratio) or float(ratio.max() - ratio.min()) <= 0.02 * float(ratio.max()):  # bfloat16 rounds
                return chosen_scores(routing.scores, expert, normalize) * (ratio.mean() if len(ratio) else 1.0)
        raise TypeError(
            f"{type(self.router).__name__} weighs experts by a rule that router replay does not know: neither "
            "scores nor their shares, times a factor"
        )

    @property
    def top_k(self) -> int:
        """Number of experts k that a token picks."""
        return self._top_k

    @top_k.setter
    def top_k(self, top_k: int) -> None:
        self.check_top_k(top_k)
        router = self._modules.get("router")  # none yet in the constructor
        if router is not None and top_k != self._top_k:
            router.top_k = top_k  # pyright: ignore[reportArgumentType]
        self._top_k = top_k

    def check_top_k(self, top_k: int) -> None:
        """See `Gate.check_top_k`. Another k needs a router that obeys its `top_k`."""
        super().check_top_k(top_k)
        router = self._modules.get("router")
        if router is None or top_k == self._top_k or (self.changes_k and hasattr(router, "top_k")):
            return
        raise ValueError(f"{type(router).__name__} always picks {self._top_k} experts; got top_k={top_k}")


class PhimoeGate(RouterGate):
    """PhiMoE: SparseMixer always picks two experts, whatever the router's `top_k` is."""

    changes_k = False


class Llama4Gate(RouterGate):
    """Llama 4: the k highest logits, each weighted by its sigmoid. The router returns scores for all experts."""

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `RouterGate.choose`."""
        scores, logits = self.router(x)
        expert = logits.topk(self.top_k, dim=1).indices  # as the router itself; the scores of others are 0
        return logits, scores.gather(1, expert), expert


class DbrxGate(RouterGate):
    """DBRX: the k best scores of a softmax over all, divided by their p-norm, unless it is None.

    The router returns logits alone.
    """

    def __init__(self, router: nn.Module, weight: Tensor, top_k: int, norm: float | None) -> None:
        super().__init__(router, weight, top_k)
        self.norm = norm

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `RouterGate.choose`."""
        logits = self.router(x)
        weight, expert = logits.softmax(1).topk(self.top_k)
        if self.norm is not None:
            weight = weight / torch.norm(weight, p=self.norm, dim=-1, keepdim=True)
        return logits, weight, expert

    # any number: the router has no part in the choice
    top_k, check_top_k = Gate.top_k, Gate.check_top_k  # pyright: ignore[reportIncompatibleMethodOverride]


class JetMoeGate(RouterGate):
    """JetMoE: the softmax over the k highest logits. The router returns a plan of its own, and the logits last."""

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `RouterGate.choose`."""
        *_, logits = self.router(x)
        chosen, expert = logits.topk(self.top_k, dim=1)
        return logits, chosen.softmax(1).type_as(x), expert


class SwitchTransformersGate(RouterGate):
    """Switch Transformers: the best expert, unless `expert_capacity` earlier tokens of the sequence chose it.

    It takes the number of each token's sequence as `ids`, int64 [T], and reads the last one on the host.
    """

    takes_ids = True

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Routing:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Route tokens x [T, D] of the sequences `ids` [T], which are equally long. None is one sequence."""
        sequences = int(ids[-1]) + 1 if ids is not None and len(ids) else 1
        chosen, weight, logits = (t.flatten(0, 1) for t in self.router(x.unflatten(0, (sequences, -1))))
        accepted = chosen.any(1, keepdim=True)  # the row of a dropped token is zeros
        expert = torch.where(accepted, chosen.argmax(1, keepdim=True), -1)
        return self._routing(logits, torch.where(accepted, weight, 0), expert)
