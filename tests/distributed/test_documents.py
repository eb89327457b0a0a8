"""Rows of several documents train on every mesh as on one rank, with any number of micro-batches."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from cases import close, whole
from ranks import run
from turnout.dispatch import Meshes
from turnout.models import GPT, GPTConfig, next_token_loss, parallel_model
from turnout.moe import Balance, aux_loss

CONFIG = GPTConfig(
    vocab=16,
    dim=16,
    layers=4,
    heads=4,
    hidden=12,
    seq_len=8,
    num_experts=4,
    moe={"balance": Balance(0.5, over="sequence")},
    eod=0,
)
MESHES = {
    "pp2 tp2 ep2": (4, {"pp": 2, "tp": 2, "ep": 2}, {"micro_batches": 2}),
    "tp2 ep4 fsdp": (4, {"tp": 2, "ep": 4}, {"data": "fsdp"}),
    "tp2": (2, {"tp": 2}, {}),
    "cp2": (2, {"cp": 2}, {}),
    "cp2 tp2 ep4": (4, {"cp": 2, "tp": 2, "ep": 4}, {}),
    "ep2": (2, {"ep": 2}, {"micro_batches": 4}),
    "pp2 zbv": (2, {"pp": 2}, {"micro_batches": 4, "schedule": "zbv"}),
}


def tokens() -> torch.Tensor:
    rows = torch.randint(1, 16, (8, 9), generator=torch.Generator().manual_seed(1))
    for row, place in enumerate([3, 4, 0, 7, 1, 5, 6, 6]):
        rows[row, place] = rows[row, (place * row) % 8] = 0
    return rows


def one_rank(config: GPTConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    torch.manual_seed(0)
    model, rows = GPT(config).double(), tokens()
    task = next_token_loss(model(rows[:, :-1]), rows[:, 1:])
    aux = aux_loss(model)
    (task + aux).backward()
    return torch.stack([task, aux]).detach(), {name: p.grad for name, p in model.named_parameters()}


def stepped(axes, options, losses, grads) -> None:
    torch.manual_seed(0)
    model = parallel_model(CONFIG, Meshes.of("cpu", **axes), dtype=torch.float64, **options)
    dp = model.meshes.dense["dp"]
    parts = [part.chunk(dp.size())[dp.get_local_rank()] for part in tokens().chunk(model.micro_batches)]
    mine = torch.cat(parts)
    found = torch.stack(model.step(mine[:, :-1], mine[:, 1:]))
    dist.all_reduce(found, group=dp.get_group())
    close(found / dp.size(), losses, 1e-10, "losses")
    for part in model.parts:
        for name, p in part.named_parameters():
            close(whole(p.grad), grads[name], 1e-10, name)
    model.eval()
    held_out = model.evaluate(mine[:, :-1], mine[:, 1:])
    dist.all_reduce(held_out, group=dp.get_group())
    close(held_out / dp.size(), losses[0], 1e-10, "evaluation")


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_is_that_of_one_rank(mesh):
    losses, grads = one_rank(CONFIG)
    without, _ = one_rank(replace(CONFIG, eod=None))
    assert (losses - without).abs().min() > 1e-5
    ranks, axes, options = MESHES[mesh]
    run(ranks, stepped, axes, options, losses, grads)
