"""The transformer: causal, rotary, grouped-query, alike under one seed, and counted right."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from turnout.models import GPT, GPTConfig
from turnout.models.blocks import rotary, rotate
from turnout.moe import MoE, aux_loss

SMALL = GPTConfig(vocab=32, dim=16, layers=2, heads=2, hidden=12, seq_len=10, num_experts=4)


def build(config: GPTConfig) -> GPT:
    torch.manual_seed(0)
    return GPT(config)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(32, (3, 10), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("moe_every", [0, 1, 2])
def test_a_later_token_changes_no_earlier_logits(tokens, moe_every):
    model = build(replace(SMALL, moe_every=moe_every))
    other = tokens.clone()
    other[:, 6] = (other[:, 6] + 1) % 32
    before, after = model(tokens), model(other)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().amax(dim=(0, 2)).min() > 1e-5


def test_rotation_depends_on_distance_alone():
    cos, sin = rotary(32, 8)
    q, k = torch.randn(8), torch.randn(8)

    def score(i: int, j: int) -> torch.Tensor:
        return rotate(q.expand(32, 8), cos, sin)[i] @ rotate(k.expand(32, 8), cos, sin)[j]

    torch.testing.assert_close(score(3, 1), score(30, 28))
    assert not torch.isclose(score(3, 1), score(3, 2))


def test_grouped_queries_are_attention_with_repeated_heads(tokens):
    grouped = build(replace(SMALL, heads=4, kv_heads=2))
    full = build(replace(SMALL, heads=4))
    state = grouped.state_dict()
    for name in [n for n in state if "attention.key" in n or "attention.value" in n]:
        state[name] = state[name].unflatten(0, (2, 1, 4)).expand(2, 2, 4, 16).flatten(0, 2)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(tokens), full(tokens))


def test_one_seed_makes_one_model(tokens):
    torch.testing.assert_close(build(SMALL)(tokens), build(SMALL)(tokens), rtol=0, atol=0)


def test_every_parameter_learns(tokens):
    model = build(SMALL)
    (model(tokens).square().mean() + aux_loss(model)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("gate", ["noisy_topk", "hierarchical", "random", "hash"])
def test_every_gate(tokens, gate):
    model = build(replace(SMALL, moe={"gate": gate}))
    (model(tokens).square().mean() + aux_loss(model)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_hash_gate_gets_the_tokens(tokens):
    layer = build(replace(SMALL, moe={"gate": "hash"})).blocks[1].feed_forward
    assert isinstance(layer, MoE)
    model = build(replace(SMALL, moe={"gate": "hash"}))
    model(tokens[:1, :4])
    layer(torch.randn(4, SMALL.dim), ids=tokens[0, :4])
    seen = model.blocks[1].feed_forward.stats.tokens_per_expert
    assert torch.equal(seen, layer.stats.tokens_per_expert)
    assert seen.count_nonzero() > 1


def test_moe_blocks_are_every_nth():
    kinds = [isinstance(b.feed_forward, MoE) for b in build(replace(SMALL, layers=4)).blocks]
    assert kinds == [False, True, False, True]


def test_dense_twin_has_equal_flops_and_they_are_counted_right(tokens):
    moe, dense = build(SMALL), build(replace(SMALL, moe_every=0))
    router = SMALL.dim * SMALL.num_experts
    assert moe.active_parameters() == dense.active_parameters() + router
    with FlopCounterMode(display=False) as counter:
        dense(tokens).sum().backward()
    attention = 12 * SMALL.layers * SMALL.dim * 10
    matrices = dense.flops_per_token(10) - attention
    counted = counter.get_total_flops() / tokens.numel()
    assert matrices * 0.9 < counted < dense.flops_per_token(10) * 1.1


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="multiple of 2"):
        GPTConfig(dim=10, heads=4)
    with pytest.raises(ValueError, match="kv_heads=3"):
        GPTConfig(dim=32, heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="seq_len=10"):
        build(SMALL)(torch.zeros(1, 11, dtype=torch.long))


@pytest.mark.parametrize("gate", ["topk", "hash"])
def test_stages_one_after_another_are_the_model(tokens, gate):
    config = replace(SMALL, layers=5, moe={"gate": gate})
    whole = build(config)

    def stage(kept: range) -> GPT:
        torch.manual_seed(0)
        return GPT(config, kept)

    first, middle, last = stage(range(2)), stage(range(2, 3)), stage(range(3, 5))
    hidden = middle(tokens, hidden=first(tokens))
    assert [x.shape for x in hidden] == [(3, 10, 16)]
    torch.testing.assert_close(last(tokens, hidden=hidden), whole(tokens), rtol=0, atol=0)
    held = {name: p for part in (first, middle, last) for name, p in part.named_parameters()}
    assert held.keys() == dict(whole.named_parameters()).keys()
    assert all(torch.equal(held[name], p) for name, p in whole.named_parameters())
    assert torch.equal(first.embed.weight, last.embed.weight)
    assert middle.embed is None
    with pytest.raises(ValueError, match="must have 1 tensors here, as the pipeline stage before"):
        last(tokens)
