"""Muon: its formula, and that it moves a model on any mesh as on one rank. The oracle takes singular values apart."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from cases import close, whole
from ranks import run
from test_oracle import CASES, LOSSES, MICRO_BATCHES, Case, config, micro_batches
from torch import Tensor
from turnout.models import GPT, Muon, checkpoint, muon_groups, next_token_loss
from turnout.models.muon import newton_schulz
from turnout.moe import aux_loss

STEPS, SAVED = 5, 3
RATE, DECAY, MOMENTUM = 1e-2, 0.1, 0.95
WEIGHTS = 1e-8  # small singular values grow 500 times as fast as the norm, and rounding with them


def orthogonalised(x: Tensor) -> Tensor:
    """The quintic of arXiv:2502.16982, eq. 2, five times on each singular value."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag_embed(s) @ v


def hidden(name: str, p: Tensor) -> bool:
    router = name.endswith("feed_forward.gate.weight") and len(p) == 4  # of 4 experts; dense blocks have one, too
    return p.ndim > 1 and not router and not name.startswith("embed")


@cache
def one_rank() -> tuple[GPT, Tensor]:
    """The trained model, and the loss of each step."""
    torch.manual_seed(0)
    gpt = GPT(config("global")).double()
    mine = {name: p for name, p in gpt.named_parameters() if hidden(name, p)}
    others = [p for name, p in gpt.named_parameters() if name not in mine]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=RATE,
        betas=(0.9, 0.95),
    )
    average, losses = {name: torch.zeros_like(p) for name, p in mine.items()}, []
    for step in range(STEPS):
        seen = []
        for tokens in micro_batches(step):
            task = next_token_loss(gpt(tokens[:, :-1]), tokens[:, 1:])
            ((task + aux_loss(gpt)) / MICRO_BATCHES).backward()
            seen.append(task.detach())
        losses.append(torch.stack(seen).mean())
        adamw.step()
        with torch.no_grad():
            for name, p in mine.items():
                average[name] = MOMENTUM * average[name] + (1 - MOMENTUM) * p.grad
                update = orthogonalised(MOMENTUM * average[name] + (1 - MOMENTUM) * p.grad)
                p -= RATE * (DECAY * p + 0.2 * max(p.shape[-2:]) ** 0.5 * update)
        gpt.zero_grad()
    return gpt, torch.stack(losses)


def train(model, optimizer, steps) -> Tensor:
    dp, losses = model.meshes.dense["dp"], []
    for step in steps:
        mine = torch.cat([batch.chunk(dp.size())[dp.get_local_rank()] for batch in micro_batches(step)])
        loss = model.step(mine[:, :-1], mine[:, 1:]).task.clone()
        torch.distributed.all_reduce(loss, group=dp.get_group())
        losses.append(loss / dp.size())
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses)


def start(case: Case):
    model = case.build("global", layers=4)
    return model, Muon(muon_groups(model, weight_decay=DECAY), lr=RATE)


def trains_as_one_rank(case: Case) -> None:
    one, expected = one_rank()
    model, optimizer = start(case)
    close(train(model, optimizer, range(STEPS)), expected, LOSSES, "losses")
    found = {name: whole(p) for part in model.parts for name, p in part.named_parameters()}
    for name, p in one.named_parameters():
        if name in found:
            close(found[name], p.detach(), WEIGHTS, name)


# The first is the hardest: FSDP2 splits rows that tp has split, and experts inside of what ep has split.
@pytest.mark.sampled
@pytest.mark.parametrize(
    "name", ["dp2 tp2 ep2 fsdp", "tp2", "ep2", "dp2 fsdp", "edp2 ep2 fsdp", "etp2", "ep2 etp2", "pp2 tp2", "dp2 zero1"]
)
def test_trains_as_one_rank(name):
    one_rank()  # before the ranks fork
    run(CASES[name].ranks, trains_as_one_rank, CASES[name])


def save_after_some_steps(case: Case, folder: str) -> None:
    model, optimizer = start(case)
    train(model, optimizer, range(SAVED))
    checkpoint.save(folder, model.parts, optimizer, SAVED)


def resume(case: Case, folder: str) -> None:
    model, optimizer = start(case)
    for group in optimizer.param_groups:
        group["momentum"] = 0.5  # the checkpoint has the right one
    assert checkpoint.load_newest(folder, model.parts, optimizer).step == SAVED
    close(train(model, optimizer, range(SAVED, STEPS)), one_rank()[1][SAVED:], LOSSES, "losses")


def test_a_checkpoint_goes_on_with_its_momentum_on_another_mesh(tmp_path):
    one_rank()
    run(2, save_after_some_steps, CASES["etp2"], str(tmp_path))
    run(2, resume, CASES["dp2 fsdp"], str(tmp_path))


@pytest.mark.parametrize("shape", [(3, 4, 9), (3, 9, 4), (2, 6, 6)])
def test_newton_schulz_is_the_quintic_of_singular_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close(newton_schulz(x), orthogonalised(x), 1e-10, "update")
    close(newton_schulz(x), torch.stack([newton_schulz(each) for each in x]), 1e-12, "one by one")


def test_moves_matrices_as_torch_does():
    """torch's orthogonalises in bfloat16, so the two differ by its rounding."""
    torch.manual_seed(0)
    ours = torch.nn.Linear(6, 9, bias=False)
    theirs = torch.nn.Linear(6, 9, bias=False)
    theirs.load_state_dict(ours.state_dict())
    optimizers = (
        Muon(ours.parameters(), lr=1e-2),
        torch.optim.Muon(theirs.parameters(), lr=1e-2, adjust_lr_fn="match_rms_adamw"),
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        ours.weight.grad = torch.randn(9, 6, generator=generator)
        theirs.weight.grad = ours.weight.grad.clone()
        before = ours.weight.detach().clone()
        for optimizer in optimizers:
            optimizer.step()
        close(ours.weight.detach(), theirs.weight.detach(), 5e-4, "weights")
        assert (ours.weight - before).abs().max() > 2e-3


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"got \(6,\): put it into a group with muon=False"):
        Muon(torch.nn.Linear(4, 6).parameters())
