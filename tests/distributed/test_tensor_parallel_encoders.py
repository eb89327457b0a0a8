"""A BERT or T5 whose layers, heads and sequences are split computes what one rank does: logits and every gradient."""

from __future__ import annotations

import pytest
import torch
from cases import close, whole
from ranks import errors, run
from torch.distributed.tensor import DTensor
from turnout.dispatch import Meshes
from turnout.models import BERT, T5, BERTConfig, Swin, SwinConfig, T5Config, next_token_loss, tensor_parallel
from turnout.moe import Balance, aux_loss, parallelize, sync_gradients
from turnout.moe.layer import moe_layers

SIZES = {"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 12, "num_experts": 4, "seq_len": 8}
OTHERS = {"qk_norm": True, "attention_bias": True, "moe_every": 1}
MOE = {"balance": Balance(1e-1, over="global", z_loss=1e-2), "shared": 1}


def build(kind: str, **options) -> BERT | T5:
    torch.manual_seed(0)
    sizes = {**SIZES, "moe": MOE, **options}
    if kind == "bert":
        model = BERT(BERTConfig(segments=2, norm="layer", **sizes))
    else:  # LayerNorm of its keys would have biases without a gradient: softmax does not see them without RoPE
        model = T5(T5Config(**{"decoder_layers": 3, **sizes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "bias" in name:  # ones and zeros would hide a parameter that is left out
                p.add_(torch.arange(p.numel()).view_as(p).cos() / 2)
    return model.double()


def inputs(kind: str, padded: bool) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Inputs of four sequences, and targets."""
    generator = torch.Generator().manual_seed(1)
    read, written = (torch.randint(250, (4, length), generator=generator) for length in (8, 6))
    real, known = (torch.arange(n).expand(4, n) < torch.tensor([[n], [n - 1], [n - 3], [n]]) for n in (8, 6))
    if kind == "bert":
        given = (read, real, (read > 100).long()) if padded else (read,)
        return given, read.masked_fill(~real, -100) if padded else read.flip(1)
    return (read, written, *((real, known) if padded else ())), written.masked_fill(~known, -100)


def equal_to_one_rank(kind, tp, ep, padded, options):
    given, targets = inputs(kind, padded)
    one = build(kind, **options)
    expected = one(*given)
    (next_token_loss(expected, targets) + aux_loss(one)).backward()

    meshes = Meshes.of("cpu", tp=tp, ep=ep)
    dp = meshes.dense["dp"]
    model = tensor_parallel(build(kind, **options), meshes.dense["tp"])
    model = parallelize(model, meshes) if moe_layers(model) else model
    mine = [each.chunk(dp.size())[dp.get_local_rank()] for each in given]
    logits = model(*mine)
    assert isinstance(logits, DTensor)
    assert logits.to_local().shape[-1] == model.config.vocab // tp
    close(whole(logits), expected.detach().chunk(dp.size())[dp.get_local_rank()], 1e-13, "logits")
    own = targets.chunk(dp.size())[dp.get_local_rank()]
    share = (own != -100).sum().double() / (targets != -100).sum() * dp.size()  # of the tokens that all ranks predict
    (next_token_loss(logits, own) * share + aux_loss(model)).backward()
    sync_gradients(model, meshes)
    for (name, p), q in zip(model.named_parameters(), one.parameters(), strict=True):
        close(whole(p.grad), q.grad, 1e-13, name)


@pytest.mark.parametrize(
    ("ranks", "tp", "ep", "padded", "options"),
    [
        (2, 2, 2, True, OTHERS),
        pytest.param(2, 2, 1, False, {}, marks=pytest.mark.thorough),
        pytest.param(4, 2, 4, True, {}, marks=pytest.mark.thorough),
        pytest.param(4, 2, 2, False, {"moe_every": 0}, marks=pytest.mark.thorough),
        pytest.param(2, 2, 2, True, {"moe": {"balance": Balance(1e-1), "gate": "hash"}}, marks=pytest.mark.thorough),
    ],
    ids=["others", "tp", "dp", "dense", "hash"],
)
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_split_encoders_are_those_of_one_rank(kind, ranks, tp, ep, padded, options):
    run(ranks, equal_to_one_rank, kind, tp, ep, padded, options)


def remembered():
    model = tensor_parallel(build("t5", dropout=0.4), Meshes.of("cpu", tp=2).dense["tp"])
    seen = []
    for block in model.decoder:
        block.register_forward_pre_hook(lambda block, args: seen.append(args[1].memory))
    torch.manual_seed(7)
    model(*inputs("t5", False)[0])
    assert len(seen) == 3
    assert all(memory is seen[0] for memory in seen)  # it was gathered once
    return seen[0].to_local().detach()


def test_ranks_drop_elements_of_their_part_of_the_memory_and_gather_one():
    first, second = run(2, remembered)
    assert torch.equal(first, second)
    zeros = (first == 0).chunk(2, dim=1)
    assert all(0.2 < each.double().mean() < 0.6 for each in zeros)
    assert not torch.equal(*zeros)


def failing(what):
    mesh = Meshes.of("cpu", tp=2).dense["tp"]
    if what == "swin":
        tensor_parallel(Swin(SwinConfig()), mesh)  # pyright: ignore[reportArgumentType]
    elif what == "length":
        tensor_parallel(build("t5"), mesh)(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64))
    else:
        tensor_parallel(build(what, kv_heads=1), mesh)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("bert", "ValueError: kv_heads=1 does not split over tp=2 ranks"),
        (
            "length",
            "ValueError: sequences of 5 tokens do not split over tp=2 ranks; pad or cut them to a multiple of 2",
        ),
        ("swin", "TypeError: tensor parallelism splits a GPT, BERT or T5; got Swin: leave tp at 1"),
    ],
)
def test_what_does_not_fit_is_said_on_every_rank(what, message):
    for error in errors(2, failing, what):
        assert error.startswith(message), error
