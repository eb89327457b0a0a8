"""A layer that is given its routing."""

import pytest
import torch
from turnout.moe import MoE


def test_a_routing_made_elsewhere():
    layer = MoE(dim=8, hidden=16, num_experts=4, top_k=2, seed=0).eval()
    x = torch.randn(2, 5, 8)
    tokens, mask = x.flatten(0, 1), torch.arange(10).view(2, 5) < 8
    assert torch.equal(layer(x, routing=layer.gate(tokens)), layer(x))
    assert torch.equal(layer(x, mask, routing=layer.gate(tokens)), layer(x, mask))
    other = layer.gate(torch.randn(10, 8))
    rows = zip(tokens, other.expert.tolist(), other.weight, strict=True)
    expected = [sum(w * layer.experts[e](x[None])[0] for e, w in zip(*chosen, strict=True)) for x, *chosen in rows]
    torch.testing.assert_close(layer(x, routing=other).flatten(0, 1), torch.stack(expected))


def test_a_routing_of_other_tokens_is_refused():
    layer = MoE(dim=8, hidden=16, num_experts=4)
    with pytest.raises(ValueError, match=r"returned expert of shape \(9, 2\) for 10 tokens"):
        layer(torch.randn(10, 8), routing=layer.gate(torch.randn(9, 8)))
