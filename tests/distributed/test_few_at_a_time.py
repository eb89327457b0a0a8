"""Experts a few at a time on a CPU: on many ranks and under FSDP2 they compute what all of them at once do."""

import pytest
import torch
from cases import close, whole
from ranks import run
from test_data_parallel import batch, build
from turnout.moe.experts import blocked as in_cache
from turnout.moe.experts import feed_forward as experts


def gradients(name, few, kinds):
    """Those of a first step, by name; `kinds` collects what the experts were given, rows or tokens with their plan."""
    forward = in_cache.perceptrons
    experts.pays = lambda *sizes: few
    experts.perceptrons = lambda *args: kinds.append(args[-1] is not None) or forward(*args)
    in_cache._GROUP = 1 << 8  # several groups
    model = build(name, dtype=torch.float64)
    model.step(*batch(model))
    return {own: whole(p.grad) for part in model.parts for own, p in part.named_parameters()}


def both(name):
    few, at_once = [], []
    expected = gradients(name, False, at_once)
    for own, grad in gradients(name, True, few).items():
        close(grad, expected[own], 1e-12, own)
    assert few
    assert not at_once
    return set(few)


@pytest.mark.parametrize(("name", "tokens"), [("dp2 fsdp", True), ("ep2", False)])
def test_a_few_at_a_time_on_two_ranks(name, tokens):
    assert run(2, both, name) == 2 * [{tokens}]
