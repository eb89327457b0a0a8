"""What models are asked: tokens masked as BERT does, spans cut out as T5 does, and a loss that falls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from turnout.models import OBJECTIVES, T5Config, corrupt_spans, mask_tokens
from turnout.moe import aux_loss

IGNORED = -100


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_fifteen_percent_are_chosen_and_most_of_them_masked():
    tokens = torch.randint(256, (500, 100), generator=seeded(0))
    inputs, targets = mask_tokens(tokens, 256, generator=seeded(1))
    chosen = targets != IGNORED
    assert (chosen.sum(1) == 15).all()
    assert torch.equal(targets[chosen], tokens[chosen])
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    masked, same = inputs[chosen] == 256, inputs[chosen] == tokens[chosen]
    assert abs(float(masked.float().mean()) - 0.8) < 0.02
    assert abs(float(same.float().mean()) - (0.1 + 0.1 / 256)) < 0.015
    others = inputs[chosen][~masked & ~same]
    assert others.max() < 256
    assert len(others.unique()) > 200  # of any id
    assert chosen.float().mean(0).sub(0.15).abs().max() < 0.08  # anywhere: five standard deviations


@given(st.integers(1, 30), st.floats(0, 1), st.integers(0, 99))
def test_padding_is_never_chosen(length, share, seed):
    tokens = torch.randint(256, (4, length), generator=seeded(seed))
    mask = torch.arange(length) < torch.tensor([length, length // 2, 1, 0])[:, None]
    inputs, targets = mask_tokens(tokens, 256, share, mask, seeded(seed))
    chosen = targets != IGNORED
    assert not (chosen & ~mask).any()
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    for number, real in zip(chosen.sum(1).tolist(), mask.sum(1).tolist(), strict=True):
        assert number == min(real, max(1, round(share * real)))


@given(st.integers(2, 60), st.floats(0.05, 0.9), st.floats(1, 5), st.integers(0, 99))
def test_source_and_target_make_up_the_text(length, share, mean, seed):
    tokens = torch.randint(200, (3, length), generator=seeded(seed))
    source, target = corrupt_spans(tokens, 999, 900, share, mean, seeded(seed))
    cut = min(max(round(length * share), 1), length - 1)
    spans = min(max(round(cut / mean), 1), length - cut)
    assert source.shape == (3, length - cut + spans)
    assert target.shape == (3, cut + spans + 1)
    for text, kept, said in zip(tokens.tolist(), source.tolist(), target.tolist(), strict=True):
        assert [t for t in kept if t > 900] == list(range(999, 999 - spans, -1))
        assert [t for t in said if t > 900] == list(range(999, 998 - spans, -1))
        fills: dict[int, list[int]] = {}
        for t in said:
            if t > 900:
                fills[t] = []
            else:
                fills[max(fills, key=lambda s: -s)].append(t)
        assert all(fills[s] for s in range(999, 999 - spans, -1))  # no span is empty
        assert [u for t in kept for u in (fills[t] if t > 900 else [t])] == text
        assert kept[0] <= 900  # the first token is never cut out


def test_spans_lie_anywhere_and_vary_in_length():
    source, target = corrupt_spans(torch.arange(60).repeat(400, 1), 999, 900, generator=seeded(0))
    cut = target[:, :-1][target[:, :-1] < 900].bincount(minlength=60) / 400
    assert cut[1:].min() > 0.04
    assert not torch.equal(source[0], source[1])
    lengths = (target > 900).nonzero()[:, 1].view(400, -1).diff(dim=1) - 1
    assert lengths.unique().tolist() == list(range(1, 8))  # 9 tokens in 3 spans


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_same_seed_asks_the_same(kind):
    own = OBJECTIVES[kind]
    config, tokens = own.config(seq_len=32), torch.randint(256, (2, 33), generator=seeded(0))
    one, two, other = (own.batch(config, tokens, seeded(seed)) for seed in (1, 1, 2))
    for a, b in zip((*one[0], one[1]), (*two[0], two[1]), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one[0][0], other[0][0]) == (kind == "gpt")
    assert all(x.max() < config.vocab for x in one[0])
    state = torch.get_rng_state()
    own.batch(config, tokens, seeded(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_cut_is_said():
    tokens = torch.zeros(1, 100, dtype=torch.int64)
    with pytest.raises(ValueError, match="5 spans need 6 sentinels, but only 5"):
        corrupt_spans(tokens, 99, 94)
    with pytest.raises(ValueError, match="2 tokens or more"):
        corrupt_spans(tokens[:, :1], 999, 900)
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\]; got 2"):
        mask_tokens(tokens, 256, share=2)
    with pytest.raises(ValueError, match="start=320"):
        T5Config(start=320)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_short_run_lowers_the_loss(kind):
    own = OBJECTIVES[kind]
    config = own.config(dim=32, heads=2, hidden=32, seq_len=24, layers=2, num_experts=4)
    torch.manual_seed(0)
    model = own.model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(40):
        letter = torch.randint(97, 123, (16, 1), generator=seeded(step))  # texts of one letter each: others tell it
        inputs, targets = own.batch(config, letter.expand(16, 25), seeded(step))
        loss = own.loss(model(*inputs), targets)
        (loss + aux_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] > 5  # a guess among all ids
    assert sum(losses[-5:]) / 5 < 2, losses[-5:]  # a guess among letters, without a look at the others, is 3.26
