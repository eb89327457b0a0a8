"""Generation: logits with a cache are those without, sampling is as described, and the model stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import one_hot
from turnout.models import GPT, GPTConfig, generate
from turnout.models.generation import Cache, sample
from turnout.moe import Capacity

LENGTH = 12
OPTIONS = {
    "plain": {},
    "kv_heads": {"kv_heads": 1, "qk_norm": True},
    "untied": {"tied": False, "head_dim": 6, "rope_base": 100.0},
    "sigmoid": {"moe": {"gate": "sigmoid", "shared": 1}},
    "hash": {"moe": {"gate": "hash"}},
    "windows": {"windows": (3, 0)},
    "documents": {"eod": 3, "windows": (0, 5), "mtp": 1},
    "sinkhorn": {"moe": {"gate": "sinkhorn"}, "top_k": 1},
}


def build(moe=None, **options) -> GPT:
    torch.manual_seed(0)
    sizes = {"vocab": 32, "dim": 16, "layers": 2, "heads": 2, "hidden": 12, "num_experts": 4, "seq_len": LENGTH}
    return GPT(GPTConfig(**(sizes | options), moe=moe or {})).double()


def tokens(batch: int = 3) -> torch.Tensor:
    drawn = torch.randint(32, (batch, LENGTH), generator=torch.Generator().manual_seed(1))
    drawn[1:, 6] = 3  # a document of its own begins here, where there are some
    return drawn


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [5, 1, 4, 2]], ids=str)
def test_logits_with_a_cache_are_those_without(name, pieces):
    model = build(**OPTIONS[name]).eval()
    with torch.no_grad():
        whole = model(tokens())
        with Cache(model) as cache:
            found = torch.cat([cache.logits(piece) for piece in tokens().split(pieces, 1)], 1)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)
        torch.testing.assert_close(model(tokens()), whole)  # the cache is gone


def test_greedy_tokens_are_the_most_likely_of_the_model_without_a_cache():
    model = build(moe={"capacity": Capacity(0.5)}).train()
    prompt = tokens()[:, :4]
    found = generate(model, prompt, LENGTH - 4, temperature=0)
    assert model.training
    layer = model.blocks[1].feed_forward
    assert layer.capacity is not None
    layer.capacity = None
    expected = prompt
    for _ in range(LENGTH - 4):
        expected = torch.cat([expected, model.eval()(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, expected)
    dropless = model(expected)
    layer.capacity = Capacity(0.5)
    assert not torch.equal(model(expected), dropless)


def test_samples_follow_the_nucleus():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[[2, 0, 3, 1]].expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    for top_p, expected in {1.0: [0.15, 0.5, 0.05, 0.3], 0.7: [0.0, 0.625, 0.0, 0.375], 0.01: [0, 1, 0, 0]}.items():
        share = one_hot(sample(logits, 1.0, top_p, generator), 4).double().mean(0)
        torch.testing.assert_close(share, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0.03)
    cold = one_hot(sample(logits, 0.5, 1.0, generator), 4).double().mean(0)
    squares = torch.tensor([0.15, 0.5, 0.05, 0.3], dtype=torch.float64).square()
    torch.testing.assert_close(cold, squares / squares.sum(), rtol=0, atol=0.03)


def test_a_seed_gives_the_same_text_again():
    model, prompt = build(), tokens(1)[:, :2].expand(8, 2)
    first, again, other = (
        generate(model, prompt, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"length": 9}, "a prompt of 4 tokens and length=9 must fit into seq_len=12"),
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\) or positive; got -1.0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]; got 0.0"),
        ({"prompt": tokens()[:, :0]}, r"prompt must be int64 \[B, S\] with S at least 1; got torch.int64 \(3, 0\)"),
    ],
)
def test_what_cannot_be_generated(given, message):
    arguments = {"prompt": tokens()[:, :4], "length": 2} | given
    with pytest.raises(ValueError, match=message):
        generate(build(), **arguments)


def test_a_gate_that_sees_later_tokens_is_refused():
    with pytest.raises(ValueError, match=r"blocks\.1.feed_forward has an expert_choice gate"):
        generate(build(moe={"gate": "expert_choice"}), tokens()[:, :4], 2)
