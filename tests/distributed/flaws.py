"""What test_fuzz.py plants in one of ten cases: combinations that must be refused, in words, on every rank."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from fuzz import Case, perceptron
from reference_layer import Settings


@dataclass(frozen=True)
class Flaw:
    """What must be refused, as a ValueError on every rank."""

    message: str
    fits: Callable[[Case], bool]
    change: Callable[[Case], Case] = lambda case: case


def first(case: Case, **settings: Any) -> Case:
    """With another first layer, of the simplest gate."""
    hidden = settings.pop("hidden", case.layers[0].hidden)
    plain = Settings(case.layers[0].settings.num_experts, "topk", 1)
    changed = replace(case.layers[0], settings=replace(plain, **settings), hidden=hidden, shared=0, pad=False)
    return replace(case, layers=(changed, *case.layers[1:]), adapters=None)


def ep(case: Case) -> int:
    """Ranks that share the experts."""
    return case.axes.get("ep", case.axes.get("node", 1) * case.axes.get("local", 1))


def etp(case: Case) -> int:
    """Ranks that split each."""
    return case.axes.get("etp", 1)


FLAWS = {
    "experts do not split": Flaw(
        "does not split over ep=", lambda c: ep(c) > 1, lambda c: first(c, num_experts=ep(c) + 1)
    ),
    "hidden does not split": Flaw("does not split over etp=", lambda c: etp(c) > 1, lambda c: first(c, hidden=13)),
    "modules split inside": Flaw(
        "cannot be split inside an expert", lambda c: etp(c) > 1, lambda c: first(c, experts=perceptron)
    ),
    "adapters split inside": Flaw(
        "experts with adapters cannot be split inside",
        lambda c: etp(c) > 1,
        lambda c: replace(first(c), layers=first(c).layers[:1], adapters="early"),
    ),
    "adapters beside modules": Flaw(
        "whose matrices are not known",
        lambda c: etp(c) == 1,
        lambda c: replace(first(c, experts=perceptron), adapters="early"),
    ),
    "nodes without axes": Flaw(
        'needs a mesh with axes "node" and "local"',
        lambda c: "node" not in c.axes and "ranks_per_node" not in c.axes,
        lambda c: replace(c, dispatcher=("2dh", "node")[c.seed % 2]),
    ),
    "a loss without logits": Flaw(
        "needs the router's logits: set z_loss=0", lambda c: True, lambda c: first(c, gate="random", z_loss_weight=0.1)
    ),
    "no ids": Flaw("ids is None", lambda c: True, lambda c: first(c, gate="hash")),
    "FSDP of float64": Flaw(
        "FSDP2 divides torch.float64 gradients twice",
        lambda c: c.edp == c.tp == 1 and (c.folded or "edp" in c.axes),
        lambda c: replace(c, dtype=torch.float64, wrapper="fsdp"),
    ),
    "FSDP without edp": Flaw(
        "fully_shard_experts needs a mesh with axes edp",
        lambda c: not c.folded and not {"edp", "etp"} & set(c.axes),
        lambda c: replace(c, wrapper="fsdp"),
    ),
    "unknown wire": Flaw("wire must be None or one of", lambda c: True, lambda c: replace(c, wire="fp4")),
    "no chunks": Flaw("overlap must be None", lambda c: True, lambda c: replace(c, overlap=0)),
    "one rank differs": Flaw("MoE layers differ between ranks", lambda c: c.ranks > 1),
    "nothing split over tp": Flaw("nothing is split over", lambda c: c.tp > 1),
}


def sometimes_flawed(case: Case) -> Case:
    """One case of ten with a flaw that fits it."""
    r = random.Random(f"a flaw for {case.seed}")
    if r.random() > 0.1:
        return case
    name = r.choice([name for name, flaw in FLAWS.items() if flaw.fits(case)])
    return replace(FLAWS[name].change(case), flaw=name)
