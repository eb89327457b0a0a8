"""Every way to spread a model trains as one rank does: 20 steps' losses and gradient norms, and the final weights.

All in float64. The oracle is a plain loop over micro-batches with torch's own clipping and AdamW; it knows nothing of
ranks, but for how a capacity sees tokens (`shards`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from cases import close, runnable, whole
from ranks import errors, run
from torch import Tensor
from turnout.dispatch import Meshes
from turnout.models import GPT, GPTConfig, ParallelModel, next_token_loss, parallel_model
from turnout.moe import Balance, Capacity, MoE, aux_loss, param_groups

pytestmark = pytest.mark.sampled

STEPS, MICRO_BATCHES, BATCH, LENGTH = 20, 2, 4, 8  # sequences in a micro-batch, of all ranks together
CLIP = 0.5  # below most norms met here
LOSSES, WEIGHTS = 1e-10, 1e-9  # largest differences; both are of order 1, rounding of 1e-16

SEQUENCE = Balance(0.1, over="sequence", z_loss=1e-2)
MODELS = {
    "global": {"shared": 1, "balance": Balance(0.1, over="global", z_loss=1e-2)},
    "sequence": {"shared": 1, "balance": SEQUENCE},
    "capped": {"shared": 1, "balance": Balance(0.1, over="sequence"), "capacity": 0.75},
    "padded": {"shared": 1, "balance": SEQUENCE, "capacity": Capacity(0.75, pad=True)},
}


@dataclass(frozen=True)
class Case:
    """Ranks, the axes that are not "dp", and how the model is trained on them."""

    ranks: int
    axes: dict[str, int] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """Enough for two stages on each of two ranks, and no more than the test needs."""
        return 4 if "pp" in self.axes else 2

    def build(self, model: str, seed: int = 0, **sizes: int) -> ParallelModel:
        torch.manual_seed(seed)
        options = {"dtype": torch.float64, "micro_batches": MICRO_BATCHES, **self.options}
        return parallel_model(replace(config(model), **sizes), Meshes.of("cpu", **self.axes), **options)


CASES = {
    "tp2": Case(2, {"tp": 2}),
    "pp2 gpipe": Case(2, {"pp": 2}, {"schedule": "gpipe"}),
    "pp2 1f1b": Case(2, {"pp": 2}, {"schedule": "1f1b"}),
    "pp2 interleaved1f1b": Case(2, {"pp": 2}, {"schedule": "interleaved1f1b"}),
    "pp2 interleaved_zb": Case(2, {"pp": 2}, {"schedule": "interleaved_zb"}),
    "pp2 zbv": Case(2, {"pp": 2}, {"schedule": "zbv"}),
    "dp2": Case(2),
    "dp2 zero1": Case(2, {}, {"data": "zero1"}),
    "dp2 zero2": Case(2, {}, {"data": "zero2"}),
    "dp2 fsdp": Case(2, {}, {"data": "fsdp"}),
    "dp2 fsdp recomputed": Case(2, {}, {"data": "fsdp", "recompute": "full"}),
    "cp2": Case(2, {"cp": 2}),
    "cp4 ep4": Case(4, {"cp": 4, "ep": 4}),
    "pp2 cp2 ring": Case(4, {"pp": 2, "cp": 2, "ep": 2}, {"cp_attention": "ring"}),
    "dp2 cp2 ep2 fsdp": Case(4, {"cp": 2, "ep": 2}, {"data": "fsdp"}),
    "cp2 tp2 ep4": Case(4, {"cp": 2, "tp": 2, "ep": 4}),
    "cp2 ring": Case(2, {"cp": 2}, {"cp_attention": "ring"}),
    "pp2 cp2 ep2 zbv": Case(4, {"pp": 2, "cp": 2, "ep": 2}, {"schedule": "zbv"}),
    "ep2": Case(2, {"ep": 2}),
    "ep2 fsdp": Case(2, {"ep": 2}, {"data": "fsdp"}),
    "ep4": Case(4, {"ep": 4}),
    "etp2": Case(2, {"etp": 2}),
    "tp2 ep2": Case(2, {"tp": 2, "ep": 2}),
    "tp2 etp2": Case(2, {"tp": 2, "etp": 2}),
    "dp2 tp2 ep2 fsdp": Case(4, {"tp": 2, "ep": 2}, {"data": "fsdp"}),
    "dp2 tp2 ep4": Case(4, {"tp": 2, "ep": 4}),
    "ep2 etp2": Case(4, {"ep": 2, "etp": 2}),
    "edp2 ep2 fsdp": Case(4, {"ep": 2}, {"data": "fsdp"}),
    "pp2 dp2 fsdp": Case(4, {"pp": 2}, {"data": "fsdp"}),
    "pp2 tp2": Case(4, {"pp": 2, "tp": 2}),
    "pp2 ep2": Case(4, {"pp": 2, "ep": 2}),
    "pp2 tp2 ep2 zbv": Case(4, {"pp": 2, "tp": 2, "ep": 2}, {"schedule": "zbv"}),
    "pp2 dp4 ep2 fsdp": Case(8, {"pp": 2, "ep": 2}, {"data": "fsdp"}),
}


def config(model: str) -> GPTConfig:
    return GPTConfig(
        vocab=16, dim=16, layers=4, heads=4, kv_heads=2, hidden=12, seq_len=LENGTH, num_experts=4, moe=MODELS[model]
    )


def micro_batches(step: int) -> list[Tensor]:
    """[BATCH, LENGTH + 1] each; no two tokens alike for the model: a capacity would choose between them by rounding."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(16, (MICRO_BATCHES, BATCH, LENGTH + 1), generator=generator)
    tokens[:, :, 0] = torch.randperm(16, generator=generator)[:BATCH]
    tokens[:, :, 1] = (tokens[:, :, 0] + tokens[:, :, 1] % 15 + 1) % 16  # what repeats one token has no positions
    return list(tokens.unbind())


@cache
def one_rank(model: str, layers: int = 4, shards: int = 1) -> tuple[GPT, Tensor]:
    """The trained model, and [STEPS, 3]: loss, balance losses, norm before clipping. Shards are seen one by one."""
    torch.manual_seed(0)
    gpt = GPT(replace(config(model), layers=layers)).double()
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
    history = []
    for step in range(STEPS):
        seen = []
        for batch in micro_batches(step):
            for tokens in batch.chunk(shards):
                task = next_token_loss(gpt(tokens[:, :-1]), tokens[:, 1:])
                aux = aux_loss(gpt)
                ((task + aux) / (MICRO_BATCHES * shards)).backward()
                seen.append(torch.stack([task.detach(), aux.detach()]))
        norm = torch.nn.utils.clip_grad_norm_(gpt.parameters(), CLIP)
        history.append(torch.cat([torch.stack(seen).mean(0), norm.detach().view(1)]))
        optimizer.step()
        optimizer.zero_grad()
    return gpt, torch.stack(history)


def train(model: ParallelModel) -> Tensor:
    """What `one_rank` returns, of many."""
    optimizer = torch.optim.AdamW(param_groups(model), lr=3e-3)
    dp, history = model.meshes.dense["dp"], []
    for step in range(STEPS):
        mine = torch.cat([batch.chunk(dp.size())[dp.get_local_rank()] for batch in micro_batches(step)])
        losses = torch.stack(model.step(mine[:, :-1], mine[:, 1:]))
        dist.all_reduce(losses, group=dp.get_group())
        history.append(torch.cat([losses / dp.size(), model.clip_grad_norm_(CLIP).view(1)]))
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(history)


def trains_as_one_rank(case: Case, model: str, shards: int = 1, change=lambda model: None) -> None:
    one, expected = one_rank(model, case.layers, shards)
    many = case.build(model, layers=case.layers)
    change(many)
    close(train(many), expected, LOSSES, "losses and norms")
    found = {name: whole(p) for part in many.parts for name, p in part.named_parameters()}
    for name, p in one.named_parameters():
        if name in found:
            close(found[name], p.detach(), WEIGHTS, name)
    names = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(names, set(found))
    assert set.union(*names) == {name for name, _ in one.named_parameters()}


def compare(case: Case, model: str, shards: int = 1) -> None:
    one, expected = one_rank(model, case.layers, shards)  # before the ranks fork
    layers = [layer for layer in one.modules() if isinstance(layer, MoE)]
    assert all((layer.stats.dropped > 0) == (layer.capacity is not None) for layer in layers)
    assert (expected[:, 2] > CLIP).sum() > STEPS / 2
    assert expected[-5:, 0].mean() != expected[:5, 0].mean()
    run(case.ranks, trains_as_one_rank, case, model, shards)


@pytest.mark.parametrize("name", runnable(CASES))
def test_trains_as_one_rank(name):
    compare(CASES[name], "global")


@pytest.mark.parametrize("name", runnable(["pp2 zbv", "cp2 tp2 ep4", "dp2 fsdp", "ep2", "tp2 ep2"]))
def test_balance_within_sequences(name):
    compare(CASES[name], "sequence")


@pytest.mark.parametrize("model", ["capped", "padded"])
@pytest.mark.parametrize(("name", "shards"), [("dp2 zero1", 2), ("ep4", 4), ("etp2", 2), ("pp2 ep2", 2)])
def test_capped_runs_equal_the_oracle_that_knows_the_shards(name, shards, model):
    compare(CASES[name], model, shards)


def swap_experts(model: ParallelModel) -> None:
    for layer in model.modules():
        if isinstance(layer, MoE):
            w = layer.experts.w_up.to_local()
            with torch.no_grad():
                w[[0, 1]] = w[[1, 0]]


def forget_a_router(model: ParallelModel) -> None:
    routers = [layer.gate.weight for layer in model.modules() if isinstance(layer, MoE)]
    routers[0].register_hook(lambda grad: grad * (1 + 1e-6))


@pytest.mark.parametrize("change", [swap_experts, forget_a_router])
@pytest.mark.parametrize("name", ["ep2", "pp2 1f1b"])
def test_the_comparison_notices(name, change):
    one_rank("global", CASES[name].layers)  # before the ranks fork
    assert any(e.startswith("AssertionError") for e in errors(2, trains_as_one_rank, CASES[name], "global", 1, change))
