"""Multi-token prediction of packed documents: gradients do not depend on how a batch is cut."""

from __future__ import annotations

import pytest
import torch
from turnout.models import GPT, GPTConfig, next_token_loss
from turnout.moe import Balance, aux_loss

CONFIG = GPTConfig(
    vocab=16, dim=16, layers=2, heads=2, hidden=8, seq_len=12, num_experts=4, moe_every=1, eod=0, mtp=2, z_loss=0.1,
    moe={"balance": Balance(0.1, over="sequence")},
)  # fmt: skip
IDS = torch.randint(1, 16, (4, 13), generator=torch.Generator().manual_seed(0))
for row, ends in enumerate([(), (5,), (2, 3, 7, 9), (1, 11)]):  # unequal numbers of further targets
    IDS[row, list(ends)] = 0


def gradients(parts: int) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model, loss = GPT(CONFIG).double(), 0.0
    for ids in IDS.chunk(parts):
        logits = model(ids[:, :-1], targets=ids[:, 1:])
        part = (next_token_loss(logits, ids[:, 1:]) + aux_loss(model)) / parts
        part.backward()
        loss += float(part.detach())
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_has_the_gradients_of_one(parts):
    whole, expected = gradients(1)
    loss, found = gradients(parts)
    assert loss == pytest.approx(whole, rel=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert found["mtp.1.join.project.weight"].abs().sum() > 0
