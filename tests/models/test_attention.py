"""Each kind of attention against the formula, in float64: outputs and gradients."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from turnout.models import T5Config
from turnout.models.blocks import Attention, Config, rotary
from turnout.models.t5 import RelativeBias, bucket

LENGTH, MEMORY, DIM = 6, 5, 16
REAL = torch.tensor([[True] * 6, [True, False, True, True, False, False]])  # of the sequence
READ = torch.tensor([[True, True, True, False, False], [False, True, True, True, True]])  # of the memory


def layer(causal: bool = False, **sizes) -> Attention:
    torch.manual_seed(0)
    attention = Attention(Config(dim=DIM, heads=4, **sizes), causal).double()
    for p in attention.parameters():
        torch.nn.init.normal_(p, std=0.5)  # scores that differ
    return attention


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def compare(attention, x, y, expected, more=()):
    """Output, and the gradients of inputs and matrices."""
    assert reference.close(y, expected, 1e-12)
    weight = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = [x, *attention.parameters(), *more]
    actual = torch.autograd.grad((y * weight).sum(), wanted)
    for a, b in zip(actual, torch.autograd.grad((expected * weight).sum(), wanted), strict=True):
        assert b.abs().max() > 1e-3
        assert reference.close(a, b, 1e-11)


def by_formula(attention, x, memory, each):
    weights = {name: getattr(attention, name).weight for name in ("query", "key", "value", "out")}
    heads = attention.heads, attention.kv_heads
    return torch.stack([reference.attention(x[n], memory[n], weights, *heads, **each(n)) for n in range(len(x))])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_to_itself_with_rotary_positions(causal, kv_heads):
    attention, x = layer(causal, kv_heads=kv_heads), draw(2, LENGTH, DIM)
    cos, sin = (t.double() for t in rotary(LENGTH, DIM // 4))
    allowed = (lambda i, j: j <= i) if causal else None
    expected = by_formula(attention, x, x, lambda n: {"allowed": allowed, "rotary": True})
    y = attention(x, cos, sin)
    assert not reference.close(attention(x), expected, 1e-2)  # the angles matter
    assert reference.close(y, expected, 1e-6)  # the table of angles is float32
    attention.float()
    assert reference.close(attention(x.float(), *rotary(LENGTH, DIM // 4)), expected, 1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_padding(kv_heads):
    attention, x = layer(kv_heads=kv_heads), draw(2, LENGTH, DIM)
    y = attention(x, mask=REAL[:, None, None, :])
    compare(attention, x, y, by_formula(attention, x, x, lambda n: {"allowed": lambda i, j: REAL[n, j]}))


@pytest.mark.parametrize("causal", [True, False])
def test_relative_bias(causal):
    attention, x = layer(), draw(2, LENGTH, DIM)
    table = RelativeBias(T5Config(dim=DIM, heads=4, buckets=8, max_distance=5), causal).double()
    torch.nn.init.normal_(table.weight)

    def bias(h, i, j):  # by hand: half of the buckets to each side; 8 or 4, half of them exact
        if causal:
            return table.weight[[0, 1, 2, 3, 4, 7][i - j], h]
        return table.weight[(4 if j > i else 0) + [0, 1, 2, 2, 3, 3][abs(i - j)], h]

    seen = (lambda i, j: j <= i) if causal else (lambda i, j: True)
    expected = by_formula(attention, x, x, lambda n: {"allowed": seen, "bias": bias})
    compare(attention, x, attention(x, mask=table(LENGTH)), expected, more=[table.weight])


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cross(kv_heads):
    attention, x, memory = layer(kv_heads=kv_heads), draw(2, LENGTH, DIM), draw(2, MEMORY, DIM)
    y = attention(x, mask=READ[:, None, None, :], memory=memory)
    expected = by_formula(attention, x, memory, lambda n: {"allowed": lambda i, j: READ[n, j]})
    compare(attention, x, y, expected, more=[memory])


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_widen_with_distance(causal):
    found = bucket(-torch.arange(300), 32, 128, causal)
    exact = 16 if causal else 8
    assert found[:exact].tolist() == list(range(exact))
    for distance in range(exact, 300):
        grown = exact + int(exact * math.log(distance / exact) / math.log(128 / exact))
        assert found[distance] == min(grown, 2 * exact - 1)
    later = bucket(torch.arange(1, 300), 32, 128, causal)
    assert torch.equal(later, torch.zeros_like(later) if causal else found[1:] + 16)


def test_a_sequence_of_padding_alone_stays_finite():
    attention, x = layer(), draw(2, LENGTH, DIM)
    for mask in (torch.zeros(2, 1, 1, LENGTH, dtype=torch.bool), torch.full((2, 1, 1, LENGTH), -torch.inf).double()):
        y = attention(x, mask=mask)
        y.sum().backward()
        assert y.isfinite().all()
        assert all(p.grad.isfinite().all() for p in attention.parameters())
