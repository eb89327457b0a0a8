"""Cases for test_fuzz.py: a seed draws a model, a mesh, a transport and a way to train."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from reference_layer import Settings
from torch import Tensor, nn
from turnout.moe.capacity import POLICIES
from turnout.moe.experts.activation import ACTIVATIONS
from turnout.moe.gates import GATES

WIDTH = 12
NODES = [{"node": 2, "local": 2}, {"node": 1, "local": 2}, {"node": 2, "local": 1}, {"node": 4, "local": 1}]
MESHES = [
    *({"ep": 1}, {"edp": 1, "ep": 1}, {"ep": 2}, {"edp": 2}, {"edp": 1, "ep": 2}, {"edp": 2, "ep": 1}),
    *(
        {"ep": 3},
        {"edp": 3, "ep": 1},
        {"ep": 4},
        {"edp": 2, "ep": 2},
        {"edp": 2, "ep": 2},
        {"edp": 1, "ep": 4},
        {"edp": 4},
    ),
    *(*NODES, {"node": 2, "local": 2}, {"node": 1, "local": 4}),
    *({"edp": 2, "node": 2, "local": 1}, {"edp": 2, "node": 1, "local": 2}),
    *(
        {"ep": 1, "etp": 2},
        {"ep": 2, "etp": 2},
        {"ep": 1, "etp": 3},
        {"ep": 1, "etp": 4},
        {"edp": 2, "ep": 1, "etp": 2},
    ),
    *({"node": 2, "local": 1, "etp": 2}, {"node": 1, "local": 2, "etp": 2}),
]
FOLDED = [  # of `Meshes.of`, with their number of ranks
    *((2, {"ep": 2}), (4, {"ep": 2}), (4, {"ep": 4, "ranks_per_node": 2}), (4, {"ep": 2, "etp": 2})),
    *((2, {"tp": 2, "ep": 1}), (2, {"tp": 2, "ep": 2}), (4, {"tp": 2, "ep": 2}), (4, {"tp": 2, "ep": 4})),
    *((4, {"tp": 4, "ep": 2}), (4, {"tp": 2, "ep": 4, "ranks_per_node": 2}), (4, {"tp": 2, "ep": 1, "etp": 2})),
]


def perceptron() -> nn.Module:
    """An expert of a user's own."""
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, WIDTH))


KINDS: list[str | Callable[[], nn.Module]] = [*ACTIVATIONS, perceptron]


@dataclass(frozen=True)
class Layer:
    """One `MoE`: what it computes, and what must make no difference to that."""

    settings: Settings
    hidden: int
    bias: bool
    shared: int | str  # a number, or "linear", a module of one's own
    pad: bool
    recompute: bool


@dataclass(frozen=True)
class Case:
    """Everything that a seed says."""

    seed: int
    ranks: int
    axes: dict[str, int]
    folded: bool  # axes of `Meshes.of`
    dispatcher: str
    overlap: int | None
    wire: str | None
    layers: tuple[Layer, ...]
    dtype: torch.dtype
    wrapper: str  # "plain", "ddp", "fsdp"
    adapters: str | None  # added "early", or "late", after parallelize
    router: bool  # adapters there, too
    sizes: tuple[tuple[int, ...], ...]  # of every batch, the last one for evaluation: sequences of each rank of dp
    length: int  # of a sequence, on one rank
    masked: bool
    micro_batches: int
    optimizer: str
    clip: float | None
    flaw: str | None = None  # see flaws.py
    gathers: bool = False  # layers choose another parallelism, and experts to shadow, for every batch

    @property
    def tp(self) -> int:
        """Ranks that have parts of the same sequences."""
        return self.axes.get("tp", 1)

    @property
    def edp(self) -> int:
        """Copies of each expert."""
        return self.axes.get("edp", self.ranks // math.prod(self.axes.get(name, 1) for name in ("ep", "etp")))

    def batch(self, number: int, rank: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """A rank's x [B, S, D], mask [B, S] or None, ids [B, S], and what the output is multiplied by."""
        shape = self.sizes[number][rank // self.tp], self.length
        generator = torch.Generator().manual_seed(self.seed * 1000 + number * 10 + rank)
        x, toward = torch.randn(2, *shape, WIDTH, generator=generator, dtype=torch.float64).to(self.dtype)
        ids = torch.randint(-50, 50, shape, generator=generator)
        mask = torch.rand(shape, generator=generator) > 0.3
        if mask.sum() == 1:  # a plan for one token makes all experts equal: Sinkhorn would choose by rounding
            mask[:] = True
        return x, mask if self.masked else None, ids, toward

    def noise(self, number: int, rank: int) -> None:
        """Seed what gates draw."""
        torch.manual_seed(self.seed * 1000 + number * 10 + rank)


def drawn(seed: int) -> Case:
    """The case of a seed."""
    r = random.Random(seed)
    folded = r.random() < 0.25
    ranks, axes = r.choice(FOLDED) if folded else (0, r.choice(MESHES))
    ranks = ranks or math.prod(axes.values())
    ep, etp = axes.get("ep", axes.get("node", 1) * axes.get("local", 1)), axes.get("etp", 1)
    tp = axes.get("tp", 1)
    by_node = "node" in axes or "ranks_per_node" in axes
    exact = r.random() < 0.8
    wire = r.choice(["bf16", "fp8"]) if r.random() < 0.15 else None
    once = not exact or wire is not None  # one layer and one step: choices must not depend on what was rounded
    layers = tuple(layer(r, ep, etp) for _ in range(1 if once else r.choice([1, 1, 2])))
    named = all(isinstance(each.settings.experts, str) for each in layers)
    adapters = r.choice(["early", "late"]) if named and etp == 1 and r.random() < 0.2 else None
    steps, micro_batches = 1 if once else r.choice([1, 2]), 1 if once else r.choice([1, 1, 2])
    dp = ranks // tp
    even = r.choice([None, None, 1, 2])
    some = [0, 1, 2, 3] if tp == 1 else [1, 2, 3]  # a DTensor of nothing is never reshaped to the end (torch 2.13)
    case = Case(
        seed=seed,
        ranks=ranks,
        axes=axes,
        folded=folded,
        dispatcher=r.choice(["auto", "flat", "2dh", "node"] if by_node else ["auto", "flat"]),
        overlap=r.choice([None, None, 2, 3]),
        wire=wire,
        layers=layers,
        dtype=torch.float64 if exact else torch.float32,
        wrapper="plain",
        adapters=adapters,
        router=r.random() < 0.5,
        sizes=tuple(
            tuple(r.choice(some) if even is None else even for _ in range(dp)) for _ in range(steps * micro_batches + 1)
        ),
        length=r.choice([2, 3, 5]),
        masked=r.random() < 0.3,
        micro_batches=micro_batches,
        optimizer=r.choice(["sgd", "adamw"]),
        clip=None if r.random() < 0.5 else 0.1,
    )
    wrappers = ["plain", "plain"]
    if tp == 1:
        wrappers.append("ddp")
        if folded or ("edp" in axes and len(axes) > 1):
            wrappers.append("fsdp")
    case = replace(case, wrapper=r.choice(wrappers))
    if case.wrapper == "fsdp":  # which splits each tensor of an expert evenly, or not at all
        wide = tuple(replace(each, hidden=max(each.hidden, 12)) for each in case.layers)
        case = replace(case, layers=wide)
    if case.wrapper == "fsdp" and case.edp == 1:  # which FSDP2 cannot do in float64
        case = replace(case, dtype=torch.float32, layers=case.layers[:1], sizes=case.sizes[-2:], micro_batches=1)
    return replace(case, gathers=random.Random(f"{seed}/gathers").random() < 0.4)  # other draws are left alone


def layer(r: random.Random, ep: int = 1, etp: int = 1) -> Layer:
    """A layer that fits the mesh."""
    E = r.choice([n for n in (1, 2, 3, 4, 6, 8) if n % ep == 0])
    free = tuple(r.choices(["null", "identity", "constant"], k=r.choice([1, 2, 3]))) if r.random() < 0.15 else ()
    name = r.choice([gate for gate in GATES if gate != "gshard" or E + len(free) > 1])
    top_k, options = gate_options(r, name, E + len(free))
    experts = r.choice(KINDS if etp == 1 else list(ACTIVATIONS))
    factor = r.choice([None, 0.5, 0.75, 1.0, 1.25, float(E)])
    shared = r.choice([0, 0, 0, 1, 2, "linear"])
    settings = Settings(
        num_experts=E,
        gate=name,
        top_k=top_k,
        options=options,
        experts=experts,
        capacity_factor=factor,
        eval_capacity_factor=r.choice([None, None, 0.6, 2.0]),
        min_capacity=r.choice([1, 1, 2]),
        drop_policy=r.choice(POLICIES),
        free_experts=free,
        residual=bool(shared) and r.random() < 0.4,
        weight_on=r.choice(["output", "output", "output", "input"]),
        balance=r.choice(
            ["local", "global", "sequence", {"global": 1.0, "sequence": 0.5}, {"local": 0.3, "global": 0.7}]
        ),
        balance_choices=r.choice([None, None, None, 1]),
        aux_loss_weight=r.choice([0.0, 0.2, 0.2]),
        z_loss_weight=0.0 if name in ("random", "hash") else r.choice([0.0, 0.05]),
    )
    return Layer(
        settings=settings,
        hidden=r.choice([12, 24] if etp > 1 else [4, 12, 24]),
        bias=r.random() < 0.5,
        shared=shared,
        pad=factor is not None and r.random() < 0.5,
        recompute=r.random() < 0.25,
    )


def gate_options(r: random.Random, name: str, E: int) -> tuple[int, dict[str, Any]]:
    """A top_k, and arguments of the gate."""
    some: dict[str, list[Any]] = {"scale": [1.0, 2.5]}
    if name not in ("hierarchical", "cosine", "random", "hash"):
        some["bias"] = [False, True]
    if name in ("topk", "cosine"):
        some |= {"order": ["softmax_first", "choose_first"], "normalize": [None, True, False], "jitter": [0.0, 0.1]}
    if name == "cosine":
        some["width"] = [None, 3]
    if name == "sigmoid":
        some |= {"normalize": [True, False], "balance_loss": [False, True], "rate": [0.0, 0.05]}
    if name == "sinkhorn":
        some["iterations"] = [2, 8]
    if name == "expert_choice":
        some["most"] = [None, 1, E]
    if name == "hash":
        some["seed"] = [0, 7]
    options = {option: r.choice(values) for option, values in some.items()} if r.random() < 0.6 else {}
    top_k = 1 if name in ("switch", "base") else 2 if name == "gshard" else r.randint(1, min(E, 4))
    if name == "hierarchical":
        groups = max(g for g in range(1, math.isqrt(E) + 1) if E % g == 0)
        fits = [
            k
            for k in range(1, min(E, 4) + 1)
            if any(k % g == 0 and k // g <= E // groups for g in range(1, groups + 1))
        ]
        top_k = r.choice(fits)
    if name in ("topk", "sigmoid", "cosine") and options:
        groups = r.choice([g for g in range(1, E + 1) if E % g == 0])
        options |= {
            "groups": groups,
            "top_groups": r.choice([g for g in range(1, groups + 1) if g * E // groups >= top_k]),
        }
    return top_k, options
