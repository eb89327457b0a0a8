"""Context parallelism: what is refused, before any rank waits. That it trains as one rank does: test_oracle.py."""

from __future__ import annotations

import pytest
import torch
from ranks import errors, run
from turnout.dispatch import Meshes
from turnout.models import BERT, GPT, T5, BERTConfig, GPTConfig, T5Config, context_parallel, parallel_model
from turnout.models import data_parallel, tensor_parallel
from turnout.moe import parallelize

CONFIG = GPTConfig(vocab=16, dim=16, layers=2, heads=2, hidden=8, seq_len=8, num_experts=2)


def refused(what: str) -> None:
    meshes = Meshes.of("cpu", cp=2)
    tokens = torch.zeros(2, 7, dtype=torch.int64)
    if what == "heads":
        context_parallel(GPT(GPTConfig(heads=3, dim=12)), meshes)
    elif what == "twice":
        context_parallel(context_parallel(GPT(CONFIG), meshes), meshes)
    elif what == "length":
        parallel_model(CONFIG, meshes).step(tokens, tokens)
    elif what == "forgotten":
        parallelize(GPT(CONFIG), meshes)
    elif what == "T5":
        context_parallel(T5(T5Config()), meshes)
    elif what == "BERT":
        parallel_model(BERTConfig(), meshes)
    elif what == "BERT, tp":
        tensor_parallel(BERT(BERTConfig()), meshes.dense["tp"])
    else:
        data_parallel(T5(T5Config()), meshes)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("heads", "ValueError: heads=3 with kv_heads=3 do not split over cp=2 x tp=1 ranks"),
        ("twice", "ValueError: sequences are split already: call context_parallel once"),
        ("length", "ValueError: sequences of 7 tokens do not split over cp=2 ranks; pad or cut them to a multiple of 2"),
        ("forgotten", "ValueError: cp > 1, but sequences are not split: every cp rank would send all tokens; call"),
        ("T5", "TypeError: context parallelism splits a GPT; got T5: spread the experts of other models by"),
        ("BERT", "TypeError: parallel_model splits a GPT; got BERTConfig: spread the experts of other models by"),
        ("BERT, tp", "TypeError: tensor parallelism splits a GPT; got BERT: spread the experts of other models by"),
        ("T5, dp", "TypeError: data_parallel splits a GPT; got T5: spread the experts of other models by"),
    ],
)
def test_what_does_not_fit_is_refused(what, message):
    for error in errors(2, refused, what):
        assert error.startswith(message)


def dropped() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = parallel_model(GPTConfig(**vars(CONFIG) | {"dropout": 0.5}), Meshes.of("cpu", cp=2))
    seen = []
    (part,) = model.parts
    part.dropout.register_forward_hook(lambda *call: seen.append(call[-1] == 0))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    model.step(tokens, tokens)
    return seen[0], next(part.parameters()).grad


def test_ranks_drop_different_elements_of_their_own_part():
    (first, gradient), (second, again) = run(2, dropped)
    assert first.shape == second.shape == (2, 4, 16)
    assert not torch.equal(first, second)
    assert torch.equal(gradient, again)
