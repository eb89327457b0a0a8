"""Every gate by its name, in float64; nothing of the package is imported.

What a gate draws is drawn here in the same order, from torch's generator.
"""

import math
from dataclasses import dataclass
from typing import Any

import networkx
import reference
import reference_gates
import torch


@dataclass(frozen=True)
class Routed:
    """Of one rank's tokens: choices [T, k], weights, scores [T, E], logits, the gate's own losses; who was kept."""

    expert: torch.Tensor
    weight: torch.Tensor
    scores: torch.Tensor
    logits: torch.Tensor | None = None
    losses: tuple = ()
    mask: torch.Tensor | None = None
    kept: torch.Tensor | None = None


@dataclass(frozen=True)
class Call:
    """What a gate sees: tokens whose padding is zero, its tensors, its options."""

    x: torch.Tensor
    tensors: dict[str, torch.Tensor]
    E: int
    k: int
    options: dict[str, Any]
    training: bool
    mask: torch.Tensor | None
    ids: torch.Tensor | None
    dtype: torch.dtype  # of the tokens outside of here

    @property
    def wide(self):
        """The dtype of a router's draws."""
        return torch.promote_types(self.dtype, torch.float32)

    def router(self, x):
        """Features, and a matrix for them: a bias is the weight of a feature that is 1."""
        weight, bias = self.tensors["weight"], self.tensors.get("bias")
        if bias is None:
            return x, weight
        return torch.cat([x, torch.ones_like(x[:, :1])], 1), torch.cat([weight, bias.unsqueeze(1)], 1)


def topk(call, default=0.0):
    return top_of(call, *call.router(jittered(call, default)))


def jittered(call, default=0.0):
    jitter = call.options.get("jitter", default)
    if not (call.training and jitter):
        return call.x
    noise = torch.empty(call.x.shape, dtype=call.dtype).uniform_(1 - jitter, 1 + jitter)
    return (call.x * noise).to(call.dtype).double()


def top_of(call, x, router):
    groups, top_groups = call.options.get("groups", 1), call.options.get("top_groups")
    order, normalize = call.options.get("order", "softmax_first"), call.options.get("normalize")
    if top_groups not in (None, groups):
        normalize = (call.k > 1 if normalize is None else normalize) or order == "choose_first"
        routed = reference_gates.route_softmax_in_groups(x, router, call.k, normalize, groups, top_groups)
        return Routed(*routed, x @ router.T)
    return Routed(*reference.route_topk(x, router, call.k, normalize, order))


def gshard(call):
    routed = reference.route_topk(*call.router(call.x), 2, True)
    if not call.training:
        return Routed(*routed)
    lost = torch.rand(routed[1].shape, dtype=call.wide) >= 2 * routed[1].detach().to(call.wide)
    return Routed(torch.where(lost, -1, routed[0]), torch.where(lost, 0.0, routed[1]), *routed[2:])


def noisy_topk(call):
    x, router = call.router(call.x)
    logits = x @ router.T
    noise = torch.randn(logits.shape, dtype=call.wide).double() if call.training else None
    spread = torch.cat([call.tensors["noise_weight"], torch.zeros(call.E, x.shape[1] - call.x.shape[1])], 1)
    *routed, importance, load = reference.route_noisy(x, router, spread, noise, call.k, mask=call.mask)
    return Routed(*routed, logits, (importance, load))


def hierarchical(call):
    E, outer, inner = call.E, call.tensors["group_weight"], call.tensors["weight"]
    groups = len(outer)
    fit = [g for g in range(1, groups + 1) if call.k % g == 0 and call.k // g <= E // groups]
    wanted = call.options.get("top_groups") or min(fit, key=lambda g: abs(g - math.sqrt(call.k)))
    routed = reference.route_hierarchical(call.x, outer, inner, wanted, call.k // wanted)
    return Routed(*routed, (call.x @ outer.T).repeat_interleave(E // groups, 1) + call.x @ inner.T)


def sigmoid(call):
    x, router = call.router(call.x)
    rule = {name: call.options[name] for name in ("normalize", "groups", "top_groups") if name in call.options}
    rule["top_groups"] = rule.get("top_groups") or rule.get("groups", 1)
    return Routed(*reference_gates.route_sigmoid(x, router, call.tensors["expert_bias"], call.k, **rule), x @ router.T)


def expert_choice(call):
    x, router = call.router(call.x)
    logits = x @ router.T
    scores = logits.softmax(1)
    limit = reference.capacity_limit(1.0, call.k, len(x), call.E)
    pairs = reference_gates.choose_tokens(scores.detach(), limit, call.mask)
    most = call.options.get("most") or call.E
    expert = torch.full((len(x), most), -1)
    for t in range(len(x)):
        row = sorted((e for e in range(call.E) if (t, e) in pairs), key=lambda e: -float(scores[t, e].detach()))[:most]
        expert[t, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return Routed(expert, of_chosen(scores, expert), scores, logits)


def cosine(call):
    point = jittered(call) @ call.tensors["projection"].T
    square = point.square().sum(1, keepdim=True)
    point = point / torch.where(square > 0, square, 1.0).sqrt()  # padding is 0, and stays there
    temperature = call.tensors["temperature"].clamp(min=0.01)
    router = call.tensors["weight"] / call.tensors["weight"].square().sum(1, keepdim=True).sqrt()
    return top_of(call, point / temperature, router)


def sinkhorn(call):
    x, router = call.router(call.x)
    logits = x @ router.T
    scores, plan = logits.softmax(1), logits.detach()
    if call.training:
        plan = reference_gates.sinkhorn(plan, call.options.get("iterations", 8), call.mask)
    expert = torch.tensor(
        [sorted(range(call.E), key=lambda e: -float(row[e]))[: call.k] for row in plan], dtype=torch.int64
    ).reshape(len(x), call.k)
    weight = of_chosen(scores, expert)
    return Routed(expert, weight / weight.sum(1, keepdim=True) if call.k > 1 else weight, scores, logits)


def base(call):
    x, router = call.router(call.x)
    logits = x @ router.T
    real = [t for t in range(len(x)) if call.mask is None or bool(call.mask[t])]
    expert = torch.full((len(x), 1), -1)
    if call.training:
        for t, e in assigned(logits.detach(), real):
            expert[t] = e
    else:
        expert = logits.detach().argmax(1, keepdim=True)
    scores = 1 / (1 + (-logits).exp())
    return Routed(expert, of_chosen(scores, expert), scores, logits)


def assigned(value, real):
    """The pairs (token, expert) of the assignment of largest sum whose loads are even: a flow of least cost."""
    flow, E = networkx.DiGraph(), value.shape[1]
    for t in real:
        flow.add_node(("token", t), demand=-1)
        for e in range(E):
            flow.add_edge(("token", t), ("expert", e), capacity=1, weight=-round(float(value[t, e]) * 2**40))
    for e in range(E):
        flow.add_node(("expert", e), demand=len(real) // E)
        flow.add_edge(("expert", e), "rest", capacity=1, weight=0)
    flow.add_node("rest", demand=len(real) % E)
    taken = networkx.network_simplex(flow)[1]
    return [(t, e) for t in real for e in range(E) if taken["token", t]["expert", e]]


def random(call):
    T, E, k = len(call.x), call.E, call.k
    if not call.training:
        return evenly(call, [hashed(t, E, k) for t in range(T)])
    draw = torch.randint(2**62, (T, k)).tolist()
    return evenly(call, [distinct([d % (E - j) for j, d in enumerate(row)], E) for row in draw])


def from_ids(call):
    return evenly(call, [hashed(i, call.E, call.k, call.options.get("seed", 0)) for i in call.ids.tolist()])


def evenly(call, expert):
    expert = torch.tensor(expert, dtype=torch.int64).reshape(len(call.x), call.k)
    scores = torch.full((len(call.x), call.E), 1 / call.E, dtype=torch.float64)
    return Routed(expert, torch.full(expert.shape, 1 / call.k, dtype=torch.float64), scores)


def distinct(draws, E):
    """Each draw is a place among the experts that are left."""
    left = list(range(E))
    return [left.pop(d) for d in draws]


def hashed(number, E, k, seed=0):
    """Draws of splitmix64, started by a hash of seed and number."""

    def mixed(z):
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    start = mixed(mixed(seed) ^ number % 2**64)
    return distinct([mixed(start + j * 0x9E3779B97F4A7C15) % 2**63 % (E - j) for j in range(k)], E)


def of_chosen(scores, expert):
    return torch.where(expert < 0, 0.0, scores.gather(1, expert.clamp(min=0)))


GATES = {
    "topk": topk,
    "switch": lambda call: topk(call, 1e-2),
    "gshard": gshard,
    "noisy_topk": noisy_topk,
    "hierarchical": hierarchical,
    "sigmoid": sigmoid,
    "expert_choice": expert_choice,
    "cosine": cosine,
    "sinkhorn": sinkhorn,
    "base": base,
    "random": random,
    "hash": from_ids,
}

BALANCED = {"noisy_topk", "sigmoid", "expert_choice", "sinkhorn", "base", "random", "hash"}  # no balance loss
