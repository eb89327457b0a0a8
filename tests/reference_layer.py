"""A whole layer as it is written down: every gate, capacity, all kinds of experts, losses, in float64.

Nothing of the package is imported. A layer is its settings and its state dict; `forward` takes the tokens of one rank.
"""

from dataclasses import dataclass, field
from typing import Any

import reference
import reference_gates
import torch
from reference_routes import BALANCED, GATES, Call, Routed
from torch.func import functional_call


@dataclass(frozen=True)
class Settings:
    """What says which function a layer is; the names are those of the layer's arguments."""

    num_experts: int
    gate: str
    top_k: int
    options: dict[str, Any] = field(default_factory=dict)  # of the gate
    experts: Any = "swiglu"  # a name, or a factory of modules
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    min_capacity: int = 1
    drop_policy: str = "score"
    free_experts: tuple[str, ...] = ()
    residual: bool = False
    weight_on: str = "output"
    balance: Any = "local"
    balance_choices: int | None = None
    aux_loss_weight: float = 1e-2
    z_loss_weight: float = 0.0

    @property
    def choices(self):
        return self.num_experts + len(self.free_experts)


def adapted(state, scale, merged=False):
    """Tensors with what adapters add to them, and without the adapters."""
    out = {name: t for name, t in state.items() if "lora." not in name}
    for name in state if not merged else ():
        if name.endswith(".a"):
            prefix, _, matrix = name.removesuffix(".a").partition("lora.default")
            matrix = matrix.removeprefix(".")
            change = scale * state[name] @ state[name[:-1] + "b"].mT
            own = f"{prefix}w_{matrix}" if matrix else f"{prefix}weight"
            out[own] = out[own] + (change if matrix else change.T)  # a router's is stored as [out, in]
    return out


def part(state, prefix):
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def route(settings, state, x, training, mask, ids, dtype):
    """The gate's choice, and who was kept."""
    real = x if mask is None else torch.where(mask.unsqueeze(1), x, 0.0)
    call = (settings.choices, settings.top_k, settings.options, training, mask, ids, dtype)
    routed = GATES[settings.gate](Call(real, part(state, "gate."), *call))
    expert, weight = routed.expert, routed.weight * settings.options.get("scale", 1.0)
    if mask is not None:
        expert, weight = (torch.where(mask.unsqueeze(1), t, nothing) for t, nothing in ((expert, -1), (weight, 0.0)))
    factor = (None if training else settings.eval_capacity_factor) or settings.capacity_factor
    kept = expert
    if factor is not None:
        limit = reference.capacity_limit(factor, settings.top_k, len(x), settings.num_experts, settings.min_capacity)
        paid = torch.where(expert < settings.num_experts, expert, -1)
        kept = reference.drop(paid, weight, limit, settings.drop_policy, routed.scores)[0]
        kept = torch.where(expert < settings.num_experts, kept, expert)
    return Routed(expert, weight, routed.scores, routed.logits, routed.losses, mask, kept)


def through(experts, tensors, e, x):
    """One token through expert e."""
    if isinstance(experts, str):
        return reference.expert_ffn(x, tensors, e, experts)
    own = {name.removeprefix("module."): t[e] for name, t in tensors.items()}
    return made_by(experts, own, x)


def made_by(factory, tensors, x):
    """One token through a module of the factory's, which draws nothing here."""
    with torch.device("meta"):
        module = factory()
    return functional_call(module, tensors, (x.unsqueeze(0),))[0]


def beside(experts, tensors, x):
    """One token through shared experts: a linear module, modules of the factory, or one wide expert."""

    def linear(name, v):
        y = tensors[f"{name}weight"] @ v
        return y + tensors[f"{name}bias"] if f"{name}bias" in tensors else y

    if "weight" in tensors:
        return linear("", x)
    if not isinstance(experts, str):
        number = len({name.split(".")[1] for name in tensors})
        return sum(made_by(experts, part(tensors, f"each.{i}."), x) for i in range(number))
    gate = linear("gate.", x) if "gate.weight" in tensors else None
    return linear("down.", reference.ACTIVATIONS[experts](linear("up.", x), gate))


def forward(settings, state, x, training=True, mask=None, ids=None, dtype=torch.float64):
    """Tokens x [T, D] of one rank -> y [T, D] and their routing. The state is float64, without adapters."""
    routed, rows = route(settings, state, x, training, mask, ids, dtype), []
    tensors, shared, free = part(state, "experts."), part(state, "shared."), part(state, "free.")
    for t in range(len(x)):
        y = torch.zeros_like(x[t])
        if mask is not None and not mask[t]:
            rows.append(y)  # padding: no expert sees it
            continue
        for j, e in enumerate(routed.kept[t].tolist()):
            w = routed.weight[t, j]
            if e >= settings.num_experts:
                kind = settings.free_experts[e - settings.num_experts]
                c = settings.free_experts[: e - settings.num_experts].count("constant")
                own = (free["constant"][c], free["mix"][c]) if kind == "constant" else ()
                y = y + w * reference_gates.free_expert(kind, x[t], *own)
            elif e >= 0 and settings.weight_on == "input":
                y = y + through(settings.experts, tensors, e, w * x[t])
            elif e >= 0:
                y = y + w * through(settings.experts, tensors, e, x[t])
        if settings.residual:
            mix = shared["coefficient.weight"], shared["coefficient.bias"]
            y = reference_gates.residual(x[t], y, beside(settings.experts, part(shared, "branch."), x[t]), *mix)
        elif shared:
            y = y + beside(settings.experts, shared, x[t])
        rows.append(y)
    return torch.stack(rows) if rows else x.clone(), routed


def joined(parts, sequences, split=1):
    """The routing of several ranks: those of `split` in a row have parts of the same `sequences`, others other ones."""
    columns = {}
    for name in ("expert", "weight", "scores", "logits", "mask"):
        values, together = [getattr(p, name) for p in parts], []
        for first in range(0, len(parts), split):
            if values[0] is not None:
                S = sequences[first]
                each = [v.reshape(S, len(v) // max(S, 1), *v.shape[1:]) for v in values[first : first + split]]
                together.append(torch.cat(each, 1).flatten(0, 1))
        columns[name] = torch.cat(together) if together else None
    return Routed(**columns)


def aux_loss(settings, parts, sequences, split=1, training=True):
    """The mean over ranks of what each adds to its loss."""
    shares = {settings.balance: 1.0} if isinstance(settings.balance, str) else settings.balance
    alone = range(0, len(parts), split)
    groups = [joined(parts[i : i + split], sequences[i : i + split], split) for i in alone]
    numbers = [sequences[i] for i in alone]
    every, number = joined(parts, sequences, split), sum(numbers)
    total, weight = torch.zeros(()), settings.aux_loss_weight

    def mean(loss, together):
        return loss(every, number) if together else sum(map(loss, groups, numbers)) / len(groups)

    if weight:
        total = total + weight * sum(sum(p.losses) for p in parts) / len(parts)
        if settings.gate not in BALANCED or settings.options.get("balance_loss"):
            for over, share in shares.items():
                loss = reference.balance_loss_sequence if over == "sequence" else reference.balance_loss

                def term(r, n, loss=loss, over=over):
                    E = settings.choices
                    how = (E, n) if over == "sequence" else (E,)
                    return loss(r.scores, r.expert, *how, mask=r.mask, choices=settings.balance_choices)

                total = total + weight * share * mean(term, training and over != "local")
    if settings.z_loss_weight:
        together = training and set(shares) != {"local"}
        total = total + settings.z_loss_weight * mean(lambda r, n: reference.z_loss(r.logits, r.mask), together)
    return total
