"""BERT and T5: who sees whom, what padding may not do, and that all of it learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from turnout.models import BERT, OBJECTIVES, T5, BERTConfig, T5Config
from turnout.moe import MoE, aux_loss

SIZES = {"dim": 16, "layers": 2, "heads": 2, "hidden": 12, "seq_len": 12, "num_experts": 4}
BOTH = BERTConfig(**SIZES, segments=2)
TEXT = T5Config(**SIZES, decoder_layers=4, buckets=8, max_distance=10)


def bert(config: BERTConfig = BOTH) -> BERT:
    torch.manual_seed(0)
    return BERT(config)


def t5(config: T5Config = TEXT) -> T5:
    torch.manual_seed(0)
    return T5(config)


def ids(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(256, (3, length), generator=torch.Generator().manual_seed(seed))


def changed(tokens: torch.Tensor, place: int) -> torch.Tensor:
    tokens = tokens.clone()
    tokens[:, place] = (tokens[:, place] + 1) % 256
    return tokens


def moved(before: torch.Tensor, after: torch.Tensor) -> list[bool]:
    """At which places [B, S, vocab] differ, in any sequence; none differs by rounding alone."""
    by = (before - after).abs().amax(dim=(0, 2))
    assert not ((by > 1e-6) & (by < 1e-5)).any()
    return (by > 1e-5).tolist()


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("moe_every", [0, 1, 2])
def test_a_bert_looks_both_ways(moe_every, norm):
    model, tokens = bert(replace(BOTH, moe_every=moe_every, norm=norm)), ids(10)
    for place in (0, 5, 9):
        assert all(moved(model(tokens), model(changed(tokens, place))))


def test_a_t5_decoder_looks_back_and_at_all_of_the_source():
    model, source, target = t5(), ids(10), ids(7, 2)
    logits = model(source, target)
    assert moved(logits, model(source, changed(target, 4))) == [False] * 4 + [True] * 3
    for place in (0, 9):
        assert all(moved(logits, model(changed(source, place), target)))
    assert torch.equal(model.decode(target, model.encode(source)), logits)


def real(length: int) -> torch.Tensor:
    return torch.arange(length) < torch.tensor([length, length - 3, 1])[:, None]


def test_padding_changes_nothing_for_real_tokens():
    mask, source, target = real(10), ids(10), ids(7, 2)
    other = torch.where(mask, source, ids(10, 5))
    model = bert()
    before, after = model(source, mask), model(other, mask)
    assert torch.equal(before[mask], after[mask])
    assert not torch.equal(model(source)[mask], before[mask])  # the mask is read
    torch.testing.assert_close(before[1:2, :7], model(source[1:2, :7]))  # as if it were not there

    model, target_mask = t5(), real(7)
    changed_target = torch.where(target_mask, target, ids(7, 6))
    before = model(source, target, mask, target_mask)
    after = model(other, changed_target, mask, target_mask)
    assert torch.equal(before[target_mask], after[target_mask])
    torch.testing.assert_close(before[1:2, :4], model(source[1:2, :7], target[1:2, :4]))
    assert moved(before, model(source, target, None, target_mask))[0]


def test_padding_goes_to_no_expert():
    for model, run in (
        (bert(), lambda m: m(ids(10), real(10))),
        (t5(), lambda m: m(ids(10), ids(7), real(10), real(7))),
    ):
        y = run(model)
        y.sum().backward()
        assert y.isfinite().all()
        seen = {name: int(m.stats.tokens_per_expert.sum()) for name, m in model.named_modules() if isinstance(m, MoE)}
        for name, number in seen.items():
            assert number == 2 * (real(7) if "decoder" in name else real(10)).sum(), name
        assert len(seen) == (1 if isinstance(model, BERT) else 3)  # every second block, of encoder and decoder


@pytest.mark.parametrize("kind", ["bert", "t5"])
@pytest.mark.parametrize("options", [{}, {"kv_heads": 1}, {"norm": "layer"}, {"moe": {"gate": "hash"}}], ids=str)
def test_every_parameter_learns(kind, options):
    own = OBJECTIVES[kind]
    config = replace(BOTH if kind == "bert" else TEXT, **options)
    torch.manual_seed(0)
    model = own.model(config)
    inputs, targets = own.batch(config, ids(13), torch.Generator().manual_seed(1))
    if kind == "bert":
        inputs = (*inputs, None, torch.arange(12).expand(3, 12) // 6)  # pyright: ignore
    (own.loss(model(*inputs), targets) + aux_loss(model)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_one_seed_makes_one_model(kind):
    build, inputs = (bert, (ids(10),)) if kind == "bert" else (t5, (ids(10), ids(7)))
    assert torch.equal(build()(*inputs), build()(*inputs))


def test_segments_are_told_apart():
    model, tokens = bert(), ids(10)
    first = torch.zeros_like(tokens)
    assert torch.equal(model(tokens), model(tokens, segments=first))
    assert not torch.equal(model(tokens), model(tokens, segments=first + 1))
    with pytest.raises(ValueError, match=r"set BERTConfig\(segments=2\)"):
        bert(replace(BOTH, segments=0))(tokens, segments=first)


def test_positions_count():
    tokens = ids(10)
    for model, run in ((bert(), lambda m, x: m(x)), (t5(), lambda m, x: m.encode(x))):
        swapped = run(model, tokens.flip(1)).flip(1)
        assert not torch.allclose(run(model, tokens), swapped, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BERTConfig(norm="batch"), "norm must be one of rms, layer; got 'batch'"),
        (lambda: BERTConfig(dropout=1.0), r"dropout must lie in \[0, 1\); got 1.0"),
        (lambda: BERTConfig(mask_token=264), "mask_token=264"),
        (lambda: T5Config(buckets=7), "buckets must be an even number"),
        (lambda: T5Config(dim=30), "dim=30 must be a multiple of heads=4"),
        (lambda: bert()(ids(13)), "seq_len=12"),
        (lambda: bert()(ids(10), torch.ones(3, 10)), "mask must be bool"),
        (lambda: t5()(ids(10), ids(13)), "seq_len=12"),
        (lambda: t5()(ids(10), ids(7), real(7)), r"mask must be bool \(3, 10\)"),
    ],
)
def test_what_does_not_fit_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()
