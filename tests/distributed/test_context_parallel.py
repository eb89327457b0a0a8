"""Context parallelism: ring attention for more ranks than heads, dropout, and what is refused before a rank waits.

That it trains as one rank does, by itself and with other axes: test_oracle.py.
"""

from __future__ import annotations

import pytest
import torch
from cases import close, whole
from ranks import errors, run
from turnout.dispatch import Meshes
from turnout.models import (
    BERT,
    GPT,
    BERTConfig,
    GPTConfig,
    SequenceSplit,
    Swin,
    SwinConfig,
    T5Config,
    context_parallel,
    data_parallel,
    next_token_loss,
    parallel_model,
)
from turnout.models.ring import Ring
from turnout.moe import Balance, aux_loss, parallelize

CONFIG = GPTConfig(vocab=16, dim=16, layers=2, heads=2, hidden=8, seq_len=8, num_experts=2)


def refused(what: str) -> None:
    meshes = Meshes.of("cpu", cp=2)
    split = SequenceSplit.of(CONFIG, meshes)
    tokens = torch.zeros(2, 7, dtype=torch.int64)
    if what == "heads":
        SequenceSplit.of(GPTConfig(heads=3, dim=12), meshes, "ulysses")
    elif what == "windows":
        SequenceSplit.of(GPTConfig(heads=3, dim=12, windows=(4,)), meshes)
    elif what == "name":
        parallel_model(CONFIG, meshes, cp_attention="allgather")
    elif what == "twice":
        context_parallel(context_parallel(GPT(CONFIG), split), split)
    elif what == "length":
        parallel_model(CONFIG, meshes).step(tokens, tokens)
    elif what == "forgotten":
        parallelize(GPT(CONFIG), meshes)
    elif what == "BERT":
        context_parallel(BERT(BERTConfig()), SequenceSplit.of(CONFIG, meshes, "ring"))
    elif what == "T5":
        parallel_model(T5Config(heads=3, dim=12), meshes)
    elif what == "source":
        source = torch.zeros(2, 6, dtype=torch.int64)
        parallel_model(T5Config(), meshes).step((source[:, 1:], source), source)
    elif what == "Swin":
        context_parallel(Swin(SwinConfig()), split)  # pyright: ignore[reportArgumentType]
    else:
        data_parallel(torch.nn.Linear(2, 2), meshes)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("heads", "ValueError: Ulysses: heads=3 with kv_heads=3 do not split over cp=2 x tp=1 ranks; use ring"),
        (
            "windows",
            "ValueError: ring attention has no dropout, windows or documents; got dropout=0.0, windows=(4,)",
        ),
        ("name", 'ValueError: how must be "ulysses", "ring" or None; got \'allgather\''),
        ("twice", "ValueError: sequences are split already: call context_parallel once"),
        (
            "length",
            "ValueError: sequences of 7 tokens do not split into 2 parts for cp=2 ranks; pad or cut them",
        ),
        ("forgotten", "ValueError: cp > 1, but sequences are not split: every cp rank would send all tokens; call"),
        ("BERT", "ValueError: ring attention is causal and for a GPT alone; got BERTConfig: use Ulysses, for which"),
        ("T5", "ValueError: Ulysses: heads=3 with kv_heads=3 do not split over cp=2 x tp=1 ranks; use a cp that"),
        ("source", "ValueError: sequences of 5 tokens do not split into 2 parts for cp=2 ranks; pad or cut them"),
        ("Swin", "TypeError: context parallelism splits a GPT, BERT or T5; got Swin: leave cp at 1, and spread"),
        ("another, dp", "TypeError: data_parallel shards a GPT, BERT or T5; got Linear: use fully_shard of FSDP2"),
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


FEW_HEADS = GPTConfig(
    vocab=16,
    dim=16,
    layers=2,
    heads=2,
    kv_heads=1,
    hidden=8,
    seq_len=16,
    num_experts=4,
    mtp=1,
    z_loss=0.1,
    moe={"balance": Balance(0.1, over="sequence")},
)
IDS = torch.randint(16, (2, 17), generator=torch.Generator().manual_seed(2))
IDS[1, 9:] = -100  # an unequal number of targets on each rank


def of_one() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    model = GPT(FEW_HEADS).double()
    loss = next_token_loss(model(IDS[:, :-1].clamp(min=0), targets=IDS[:, 1:]), IDS[:, 1:])
    aux = aux_loss(model)
    (loss + aux).backward()
    return {name: p.grad for name, p in model.named_parameters()}, torch.stack([loss, aux]).detach()


def of_many(gradients: dict[str, torch.Tensor], losses: torch.Tensor, skipped: bool) -> None:
    torch.manual_seed(0)
    model = parallel_model(FEW_HEADS, Meshes.of("cpu", cp=4, ep=2), dtype=torch.float64)
    assert sum(isinstance(module, Ring) for module in model.modules()) == 3
    if skipped:
        ring = next(module for module in model.modules() if isinstance(module, Ring))
        ring.register_forward_pre_hook(lambda ring, args: (args[0], args[1], args[2] * (1 + 1e-6)))
    found = model.step(IDS[:, :-1].clamp(min=0), IDS[:, 1:])
    close(torch.stack(found), losses, 1e-12)
    for name, p in model.parts[0].named_parameters():
        close(whole(p.grad), gradients[name], 1e-11, name)


def test_more_ranks_than_heads_go_round_a_ring():
    run(4, of_many, *of_one(), False)


def test_the_comparison_notices():
    assert all("AssertionError" in error for error in errors(4, of_many, *of_one(), True))


def in_bf16(how: str) -> float:
    torch.manual_seed(0)
    config = GPTConfig(**vars(CONFIG) | {"qk_norm": True, "norm": "layer"})
    model = parallel_model(config, Meshes.of("cpu", cp=2), bf16=True, cp_attention=how)
    tokens = torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(1))
    return float(model.step(tokens[:, :-1], tokens[:, 1:]).task)


def test_both_ways_agree_in_bf16():
    exact, *found = (run(2, in_bf16, how)[0] for how in ("ulysses", "ring"))
    assert found[0] == pytest.approx(exact, abs=2e-3)
