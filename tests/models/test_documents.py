"""Documents that share a row compute what each computes alone: logits, balance loss and gradients."""

from dataclasses import replace
from itertools import pairwise

import pytest
import reference
import torch
from reference import close
from turnout.models import GPT, GPTConfig, next_token_loss, recompute
from turnout.models.documents import document_mask, documents_of
from turnout.moe import Balance, MoE, Routing, aux_loss
from turnout.moe.losses import balance_loss

EOD = 3
CONFIG = GPTConfig(
    vocab=16,
    dim=16,
    layers=2,
    heads=4,
    kv_heads=2,
    hidden=12,
    seq_len=12,
    moe_every=1,
    num_experts=4,
    moe={"balance": Balance(0.5, over="sequence")},
    eod=EOD,
)


def packed(rows: int = 3) -> torch.Tensor:
    """Token ids [rows, 13] with documents that begin at the start, in the middle and at the end of a row."""
    tokens = torch.randint(4, 16, (rows, 13), generator=torch.Generator().manual_seed(2))
    for row, place in [(0, 5), (0, 6), (1, 0), (1, 9), (2, 11)]:
        tokens[row, place] = EOD
    return tokens


def alone(config: GPTConfig, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, GPT]:
    """Loss and balance loss of a model that knows no documents, run on one after the other."""
    torch.manual_seed(0)
    model, task, aux = GPT(replace(config, eod=None)).double(), torch.zeros(()), torch.zeros(())
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    for row, wanted in zip(inputs, targets, strict=True):
        begins = [0, *(i for i in range(1, len(row)) if row[i] == EOD), len(row)]
        for first, last in pairwise(begins):
            x, y = row[first:last].unsqueeze(0), wanted[first:last].unsqueeze(0)
            task = task + next_token_loss(model(x), y) * (last - first) / inputs.numel()
            aux = aux + aux_loss(model) * (last - first) / inputs.numel()
    return task, aux, model


@pytest.mark.parametrize("what", ["none", "selective", "full"])
def test_a_row_of_documents_is_each_alone(what):
    torch.manual_seed(0)
    tokens, model = packed(), recompute(GPT(CONFIG).double(), what)
    task = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
    aux = aux_loss(model)
    (task + aux).backward()
    expected, balance, other = alone(CONFIG, tokens)
    (expected + balance).backward()
    assert close(task, expected, 1e-8)  # angles of RoPE are float32
    assert close(aux, balance, 1e-8)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert close(p.grad, q.grad, 1e-7), name
    ignorant = next_token_loss(other(tokens[:, :-1]), tokens[:, 1:])
    assert (ignorant - expected).abs() > 1e-5  # which the comparison would see


def test_rows_of_one_document_take_the_causal_path():
    tokens = torch.randint(4, 16, (2, 12))
    assert document_mask(documents_of(tokens, EOD)) is None
    tokens[:, 0] = EOD  # it begins there
    assert document_mask(documents_of(tokens, EOD)) is None
    tokens[1, 4] = EOD
    mask = document_mask(documents_of(tokens, EOD))
    assert mask.shape == (2, 1, 12, 12)
    assert mask[1, 0, 6].nonzero().flatten().tolist() == [4, 5, 6]
    assert mask[0, 0, 6].nonzero().flatten().tolist() == list(range(7))


@pytest.mark.parametrize("masked", [False, True])
def test_the_balance_loss_of_documents_is_that_of_the_reference(masked):
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(20, 4, generator=g, dtype=torch.float64).requires_grad_()
    expert = scores.detach().topk(2).indices
    documents = torch.tensor([0] * 3 + [1] * 7 + [10] * 9 + [19])
    mask = torch.rand(20, generator=g) < 0.7 if masked else None
    routing = Routing(expert, torch.ones(20, 2), scores, documents=documents)
    found = balance_loss(routing if mask is None else routing.masked(mask), "sequence", sequences=2)
    expected = reference.balance_loss_documents(scores, expert, 4, documents.tolist(), mask)
    assert close(found, expected, 1e-12)
    grads = [torch.autograd.grad(loss, scores)[0] for loss in (found, expected)]
    assert close(*grads, 1e-11)
    assert balance_loss(routing, "global") == balance_loss(replace(routing, documents=None), "global")


def test_wrong_documents_are_refused():
    layer, x = MoE(8, 8, 4), torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"documents must be int64 \(2, 3\); got torch.float32 \(2, 3\)"):
        layer(x, documents=torch.zeros(2, 3))


@pytest.mark.slow
def test_a_compiled_model_keeps_documents_apart():
    torch.manual_seed(0)
    model, tokens = GPT(CONFIG), packed()[:, :-1]
    logits, aux = model(tokens), aux_loss(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), logits)
    torch.testing.assert_close(aux_loss(model), aux)
    torch._dynamo.reset()
