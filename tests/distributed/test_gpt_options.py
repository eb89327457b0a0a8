"""Options of a GPT's attention, head and losses, all at once: on every mesh they train as on one rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import close, whole
from ranks import errors, run
from turnout.dispatch import Meshes
from turnout.models import GPT, GPTConfig, ParallelModel, checkpoint, next_token_loss, parallel_model
from turnout.moe import Balance, aux_loss, clip_grad_norm_, param_groups
from turnout.moe.experts.sharded import held_slice, local

STEPS, MICRO_BATCHES, LENGTH = 2, 2, 8
CONFIG = GPTConfig(
    vocab=16,
    dim=16,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=6,
    qk_norm=True,
    norm_eps=1e-3,
    attention_bias=True,
    windows=(3, 0),
    tied=False,
    mtp=2,
    z_loss=1e-2,
    hidden=12,
    seq_len=LENGTH,
    moe_every=(1, 3, 4),
    num_experts=4,
    moe={"balance": Balance(0.1, over="global")},
)
CASES = {
    "pp2 tp2 ep2": (4, {"pp": 2, "tp": 2, "ep": 2}, {}),
    "tp2 ep4 fsdp": (4, {"tp": 2, "ep": 4}, {"data": "fsdp"}),
    "pp2 interleaved1f1b": (2, {"pp": 2}, {"schedule": "interleaved1f1b"}),
    "pp2 cp2": (4, {"pp": 2, "cp": 2}, {}),
}


def uneven(model: torch.nn.Module) -> None:
    """Norms other than 1 and biases other than 0, which would hide one that is left out."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            waves = torch.arange(p.shape[0]).cos()[held_slice(p)[0]] / 2
            if "norm" in name:
                local(p).mul_(1 + waves)
            elif "bias" in name:
                local(p).add_(waves)


def batches() -> torch.Tensor:
    return torch.randint(16, (STEPS, 4 * MICRO_BATCHES, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def one_rank() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    model, history = GPT(CONFIG).double(), []
    uneven(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches():
        seen = []
        for tokens in batch.chunk(MICRO_BATCHES):
            task = next_token_loss(model(tokens[:, :-1], targets=tokens[:, 1:]), tokens[:, 1:])
            aux = aux_loss(model)
            ((task + aux) / MICRO_BATCHES).backward()
            seen.append(torch.stack([task.detach(), aux.detach()]))
        norm = clip_grad_norm_(model, 0.5)
        history.append(torch.cat([torch.stack(seen).mean(0), norm.view(1)]))
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}, torch.stack(history)


def trained(axes, options, expected, change) -> None:
    weights, losses = expected
    torch.manual_seed(0)
    options = {"dtype": torch.float64, "micro_batches": MICRO_BATCHES, **options}
    model = parallel_model(CONFIG, Meshes.of("cpu", **axes), **options)
    uneven(model)
    change(model)
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    dp = model.meshes.dense["dp"]
    for batch, known in zip(batches(), losses, strict=True):
        parts = [each.chunk(dp.size())[dp.get_local_rank()] for each in batch.chunk(MICRO_BATCHES)]
        mine = torch.cat(parts)
        found = torch.stack(model.step(mine[:, :-1], mine[:, 1:]))
        dist.all_reduce(found, group=dp.get_group())
        close(torch.cat([found / dp.size(), model.clip_grad_norm_(0.5).view(1)]), known, 1e-10, "losses and norm")
        optimizer.step()
        optimizer.zero_grad()
    for part in model.parts:
        for name, p in part.named_parameters():
            close(whole(p), weights[name], 1e-9, name)


def nothing(model: ParallelModel) -> None:
    pass


def forget_a_query_norm(model: ParallelModel) -> None:
    for part in model.parts:
        for name, p in part.named_parameters():
            if name.endswith("0.attention.query_norm.weight"):
                p.register_hook(lambda grad: grad * (1 + 1e-4))


@pytest.mark.parametrize("name", CASES)
def test_trains_as_one_rank(name):
    ranks, axes, options = CASES[name]
    run(ranks, trained, axes, options, one_rank(), nothing)


def test_the_comparison_notices():
    assert any(
        "AssertionError" in error for error in errors(2, trained, {"tp": 2}, {}, one_rank(), forget_a_query_norm)
    )


def test_a_head_of_its_own_is_counted():
    torch.manual_seed(0)
    model = GPT(CONFIG)
    tied = GPT(GPTConfig(**{**vars(CONFIG), "tied": True}))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in tied.parameters()) + 16 * 16
    assert model.active_parameters() == tied.active_parameters()


def test_a_head_width_that_rope_cannot_turn_is_named():
    with pytest.raises(ValueError, match="head_dim=5 must be even"):
        GPTConfig(head_dim=5)


def saved(folder) -> None:
    torch.manual_seed(0)
    model = parallel_model(CONFIG, Meshes.of("cpu", pp=2), micro_batches=2, dtype=torch.float64)
    tokens = batches()[0]
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    model.step(tokens[:, :-1], tokens[:, 1:])
    optimizer.step()
    checkpoint.save(folder, model.parts, optimizer, 1)


def loaded(folder) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    model = parallel_model(CONFIG, Meshes.of("cpu", cp=2), dtype=torch.float64)
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    checkpoint.load(folder / "step-1", model.parts, optimizer)
    return {name: whole(p) for name, p in model.parts[0].named_parameters()}


def test_a_checkpoint_of_stages_has_further_tokens_and_one_embedding(tmp_path):
    run(2, saved, tmp_path)
    torch.manual_seed(0)
    model, tokens = GPT(CONFIG).double(), batches()[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for part in tokens.chunk(2):
        task = next_token_loss(model(part[:, :-1], targets=part[:, 1:]), part[:, 1:])
        ((task + aux_loss(model)) / 2).backward()
    optimizer.step()
    for found in run(2, loaded, tmp_path):
        assert found.keys() == dict(model.named_parameters()).keys()
        for name, p in model.named_parameters():
            close(found[name], p.detach(), 1e-9, name)
