"""Dropout: masks equal where ranks hold the same, different where they hold parts, and repeated by recomputation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from turnout.models import GPT, OBJECTIVES, GPTConfig, recompute
from turnout.models.dropout import Dropout, Part, own_numbers
from turnout.models.recompute import Core

CPU = torch.device("cpu")
SMALL = GPTConfig(vocab=32, dim=16, layers=3, heads=2, hidden=12, seq_len=10, num_experts=4, dropout=0.3)


def on_rank(place: int, number: int) -> dict[str, torch.Tensor]:
    """What a rank along "tp" drops one after the other: a part, the whole, and heads that are a part."""
    torch.manual_seed(5)
    whole, split, core = Dropout(0.5), Dropout(0.5), Core(dropout=0.5)
    split.part = core.part = Part(place, number)
    x, q = torch.ones(400), torch.ones(1, 2, 8, 8)
    v = torch.eye(8).expand(1, 2, 8, 8)
    return {
        "split": split(x),
        "whole": whole(x),
        "heads": core(q, q, v),
        "later": whole(x),
        "later split": split(x),
    }


def test_parts_differ_and_wholes_are_equal():
    first, second = on_rank(0, 2), on_rank(1, 2)
    for name in ("whole", "later"):
        assert torch.equal(first[name], second[name]), name
    for name in ("split", "heads", "later split"):
        assert (first[name] != second[name]).float().mean() > 0.3, name
    assert not torch.equal(first["split"], first["later split"])  # nor do a rank's own masks repeat
    assert not torch.equal(first["whole"], first["later"])
    assert not torch.equal(first["split"], first["whole"])


def test_with_one_part_it_is_torchs():
    torch.manual_seed(5)
    expected = torch.nn.functional.dropout(torch.ones(400), 0.5)
    assert torch.equal(on_rank(0, 1)["split"], expected)


def test_numbers_follow_from_the_seed_and_errors_restore_the_generator():
    def draw(fail: bool) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(3)
        try:
            with own_numbers(Part(1, 4), CPU):
                inside = torch.rand(5)
                if fail:
                    raise KeyError
        except KeyError:
            pass
        return inside, torch.rand(5)

    inside, outside = draw(False)
    again = draw(True)
    assert torch.equal(inside, again[0])
    assert torch.equal(outside, again[1])
    torch.manual_seed(3)
    with own_numbers(Part(0, 4), CPU):
        other = torch.rand(9)  # however many
    assert not torch.equal(other[:5], inside)
    assert torch.equal(torch.rand(5), outside)


def test_a_share_is_dropped_and_the_mean_stays():
    torch.manual_seed(0)
    y = Dropout(0.2)(torch.ones(20_000))
    assert abs(float((y == 0).float().mean()) - 0.2) < 0.02
    assert set(y.unique().tolist()) == {0.0, 1.25}
    assert torch.equal(Dropout(0.2).eval()(torch.ones(9)), torch.ones(9))


def test_weights_of_attention_are_dropped():
    torch.manual_seed(0)
    q, v = torch.zeros(1, 1, 200, 4), torch.eye(200).expand(1, 1, 200, 200)
    y = Core(dropout=0.2)(q, torch.zeros(1, 1, 200, 4), v) * 200
    assert abs(float((y == 0).float().mean()) - 0.2) < 0.02
    torch.testing.assert_close(y[y > 0], torch.full_like(y[y > 0], 1.25))


def gradients(what: str, part: Part) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = recompute(GPT(SMALL), what)  # pyright: ignore[reportArgumentType]
    for module in model.modules():
        if isinstance(module, Dropout | Core):
            module.part = part
    torch.manual_seed(1)
    model(torch.arange(10).expand(2, 10)).logsumexp(-1).mean().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("part", [Part(), Part(1, 2)])
@pytest.mark.parametrize("what", ["full", "selective"])
def test_recomputation_drops_the_same(what, part):
    expected = gradients("none", part)
    assert all(torch.equal(a, b) for a, b in zip(gradients(what, part), expected, strict=True))
    assert not torch.equal(gradients(what, Part(0, 2))[0], expected[0])


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_models_drop_in_training_alone(kind):
    own = OBJECTIVES[kind]
    config = own.config(dim=16, heads=2, hidden=8, seq_len=16, layers=2, num_experts=4, dropout=0.2)
    torch.manual_seed(0)
    model = own.model(config)
    torch.manual_seed(0)
    plain = own.model(replace(config, dropout=0.0))
    inputs, _ = own.batch(config, torch.randint(256, (2, 17)), None)
    assert not torch.equal(model(*inputs), model(*inputs))
    assert torch.equal(plain(*inputs), plain(*inputs))
    assert torch.equal(model.eval()(*inputs), plain.eval()(*inputs))
