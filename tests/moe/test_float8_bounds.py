"""Experts in float8 stay within a bound that follows from the roundings, for any sizes, loads and magnitudes.

An oracle computes in float64, and beside each number a bound on the error of what is really computed. The bound has no
chosen tolerance. A number x in a row with scale s is off by at most 2^-4 |x| in e4m3, or by 2^-10 s if it is subnormal
there, where s is below 1/224 of the largest of its row. Sums and casts add what their dtype loses.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import assignments
from torch import Tensor
from turnout.dispatch import Plan
from turnout.moe.experts import float8
from turnout.moe.experts.triton_path import fused

STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of rounding, relative
SMALLEST = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}  # of subnormal numbers


class Near(NamedTuple):
    """What is exact, float64, and how far from it may be what is computed."""

    value: Tensor
    error: Tensor

    @property
    def most(self) -> Tensor:
        return self.value.abs() + self.error

    @property
    def mT(self) -> Near:
        return Near(self.value.mT, self.error.mT)

    def __getitem__(self, at) -> Near:
        return Near(self.value[at], self.error[at])

    def __add__(self, other) -> Near:
        return Near(self.value + other.value, self.error + other.error)

    def __mul__(self, other) -> Near:
        error = self.value.abs() * other.error + self.error * other.value.abs() + self.error * other.error
        return Near(self.value * other.value, error)

    def __matmul__(self, other) -> Near:
        error = self.value.abs() @ other.error + self.error @ other.value.abs() + self.error @ other.error
        return Near(self.value @ other.value, error + self.value.shape[-1] * 2.0**-23 * (self.most @ other.most))

    def sum(self, dim: int) -> Near:
        summed = self.value.shape[dim] * 2.0**-23 * self.most.sum(dim)
        return Near(self.value.sum(dim), self.error.sum(dim) + summed)

    def to(self, dtype: torch.dtype) -> Near:
        return Near(self.value, self.error + STEP[dtype] * self.most + SMALLEST[dtype])


def exact(t: Tensor) -> Near:
    return Near(t.double(), torch.zeros_like(t, dtype=torch.float64))


def in_float8(*each: Near) -> list[Near]:
    """Rounded along the last axis, with one scale for all."""
    scale = torch.stack([t.most.amax(-1, keepdim=True) for t in each]).amax(0) / 224
    return [Near(t.value, t.error + torch.maximum(2.0**-4 * t.most, 2.0**-10 * scale)) for t in each]


def activated(activation: str, up: Near, gate: Near) -> list[Near]:
    """Hidden rows, and their slopes by up and gate: the largest change where both may be, at 9 x 9 places."""
    at = torch.linspace(-1, 1, 9, dtype=torch.float64)
    u = (up.value + at.view(-1, 1, 1, 1) * up.error).expand(9, 9, *up.value.shape).clone().requires_grad_()
    g = (gate.value + at.view(1, -1, 1, 1) * gate.error).expand(9, 9, *up.value.shape).clone().requires_grad_()
    hidden = reference.ACTIVATIONS[activation](u, g)
    slopes = torch.autograd.grad(hidden.sum(), [u, g], materialize_grads=True)
    more = (1 + up.most) * (1 + gate.most)  # what the functions themselves lose in float32 grows with it
    lost = [2.0**-20 * more * t for t in (gate.most, 1 + up.most, 1 + gate.most)]
    found = zip((hidden.detach(), *slopes), lost, strict=True)
    return [Near(t[4, 4], (t - t[4, 4]).abs().amax((0, 1)) + by) for t, by in found]


def bounds(case: dict[str, Tensor], plan: Plan, activation: str) -> dict[str, Near]:
    """The output and all gradients, by the steps of `turnout::experts`."""
    dtype, gated = case["x"].dtype, "w_gate" in case
    given = {name: exact(t) for name, t in case.items()}
    layers = ["up", "gate"] if gated else ["up"]
    stops = [0, *plan.counts.cumsum(0).tolist()]
    spans = [slice(a, b) for a, b in pairwise(stops)]
    R = stops[-1]
    token, kept = plan.token[:R], plan.slot >= 0
    weight = torch.zeros(R, 1, dtype=torch.float64)
    weight[plan.slot[kept], 0] = case["weight"][kept].double()
    weight = exact(weight)

    def products(rows: Near, matrix: Near) -> Near:
        each = [rows[span] @ matrix[e] for e, span in enumerate(spans)]
        return Near(*(torch.cat([getattr(y, part) for y in each]) for part in ("value", "error")))

    def by_expert(rows: Near, other: Near) -> Near:
        each = [(rows[span].mT @ other[span]).to(dtype) for span in spans]
        return Near(*(torch.stack([getattr(y, part) for y in each]) for part in ("value", "error")))

    def of_expert(name: str, width: int) -> Near:
        if name not in given:
            return exact(torch.zeros(R, width))
        return given[name][torch.repeat_interleave(torch.arange(len(spans)), plan.counts)]

    def columns(name: str) -> Near:
        return in_float8(given[name].mT)[0].mT

    def by_token(rows: Near) -> Near:
        sums = [torch.zeros_like(case["x"], dtype=torch.float64).index_add(0, token, t) for t in rows]
        most = torch.zeros_like(sums[0]).index_add(0, token, rows.most)
        return Near(sums[0], sums[1] + plan.slot.shape[1] * 2.0**-23 * most).to(dtype)

    x, grad, (D, H) = given["x"][token], given["grad"][token], case["w_up"].shape[1:]
    (a,) = in_float8(x)
    before = [(products(a, columns(f"w_{n}")) + of_expert(f"b_{n}", H)).to(torch.float32).to(dtype) for n in layers]
    act, *slopes = activated(activation, before[0], before[-1])
    hidden = (act * weight).to(dtype)
    y = products(in_float8(hidden)[0], columns("w_down")) + (of_expert("b_down", D) * weight).to(torch.float32)

    d = products(in_float8(grad)[0], in_float8(given["w_down"])[0].mT)
    back = [(d * slope * weight).to(torch.float32).to(dtype) for slope, _ in zip(slopes, layers, strict=False)]
    pairs = zip(in_float8(*back), in_float8(*(given[f"w_{n}"] for n in layers)), strict=True)
    one, *other = [products(rows, matrix.mT) for rows, matrix in pairs]
    to_x = (one + other[0] if other else one).to(torch.float32).to(dtype)
    to_weight = ((d * act).sum(1) + (grad * of_expert("b_down", D)).sum(1)).to(torch.float32)
    ones = exact(torch.ones(R, 1))
    found = {"y": by_token(y.to(dtype)), "x": by_token(to_x), "w_down": by_expert(hidden, grad)}
    found["weight"] = Near(*(torch.zeros_like(kept, dtype=torch.float64) for _ in range(2)))
    for part, into in zip(to_weight, found["weight"], strict=True):
        into[kept] = part[plan.slot[kept]]
    for name, rows in zip(layers, back, strict=True):
        found[f"w_{name}"] = by_expert(x, rows)
        found[f"b_{name}"] = by_expert(ones, rows)[:, 0]
    found["b_down"] = by_expert(ones, grad * weight)[:, 0]
    return found


def drawn(seed: int, D: int, H: int, E: int, T: int, k: int, kind: tuple[str, bool, torch.dtype], spread: int):
    """Numbers whose rows, and columns of matrices, differ in size by 2^spread. Some rows are zeros."""
    activation, bias, dtype = kind
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int, of: tuple[int, ...] = ()) -> Tensor:
        size = 2.0 ** -torch.randint(0, spread + 1, of or shape, generator=g).float()
        return (torch.randn(shape, generator=g) * size).to(dtype)

    def matrix(fan_in: int, fan_out: int) -> Tensor:
        return random(E, fan_in, fan_out, of=(E, 1, fan_out)) / fan_in**0.5

    x, grad = random(T, D, of=(T, 1)), random(T, D, of=(T, 1))
    x[::5], grad[::7] = 0, 0
    case = {"x": x, "grad": grad, "weight": torch.rand(T, k, generator=g)}
    gated = activation in ("swiglu", "geglu", "geglu_tanh", "reglu", "clamped_swiglu")
    for name in ["up", "gate"] if gated else ["up"]:
        case |= {f"w_{name}": matrix(D, H)} | ({f"b_{name}": random(E, H)} if bias else {})
    return case | {"w_down": matrix(H, D)} | ({"b_down": random(E, D)} if bias else {})


def worst(case: dict[str, Tensor], plan: Plan, activation: str) -> dict[str, float]:
    """The largest error of each result, as a share of its bound."""
    leaves = {name: t.clone().requires_grad_(name != "grad") for name, t in case.items()}
    layer = {
        name: (leaves[f"w_{name}"], leaves.get(f"b_{name}")) for name in ("up", "gate", "down") if f"w_{name}" in case
    }
    down = layer.pop("down")
    y = fused(leaves["x"], leaves["weight"], plan.counts, activation, [*layer.values()], down, plan, how="torch, fp8")
    learns = [name for name in case if name != "grad"]
    grads = torch.autograd.grad(y, [leaves[name] for name in learns], case["grad"])
    got, near = {"y": y, **dict(zip(learns, grads, strict=True))}, bounds(case, plan, activation)
    shares = {}
    for name, t in got.items():
        off = (t.detach().double() - near[name].value).abs()
        assert off.isfinite().all(), name
        shares[name] = float((off / near[name].error.clamp(min=2.0**-149)).max()) if t.numel() else 0.0
    return shares


KINDS = st.tuples(st.sampled_from(sorted(reference.ACTIVATIONS)), st.booleans(), st.sampled_from(sorted(STEP, key=str)))


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), assignments(), KINDS, st.integers(0, 24))
def test_results_are_within_the_bound_of_their_roundings(seed, D, H, assigned, kind, spread):
    expert, E = assigned
    case = drawn(seed, D, H, E, *expert.shape, kind, spread)
    shares = worst(case, Plan.of(expert, E), kind[0])
    assert max(shares.values()) <= 1, shares


def scales(change):
    """`float8.scales` of largest magnitudes that `change` has changed."""
    return lambda largest, plain=float8.scales: plain(change(largest))


FLAWS = {
    "one scale for all rows": ("scales", scales(lambda t: torch.full_like(t, float(t.max()) if t.numel() else 0))),
    "numbers saturate": ("scales", scales(lambda t: t / 4)),
    "scales of other columns": (
        "columns",
        lambda t, plain=float8.columns: (c := plain(t))._replace(scale=c.scale.roll(1, -1)),
    ),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_the_bound_finds_flaws(flaw, monkeypatch):
    plan = Plan.of(torch.arange(18).view(9, 2) % 3, 3)

    def most() -> float:
        drawns = [drawn(seed, D, 8, 3, 9, 2, ("swiglu", False, torch.float32), 24) for seed, D in enumerate((1, 1, 8))]
        return max(max(worst(case, plan, "swiglu").values()) for case in drawns)

    assert most() < 1
    monkeypatch.setattr(float8, *FLAWS[flaw])
    assert most() > 1.5
