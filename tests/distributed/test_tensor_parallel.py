"""Any split of layers, sequences and experts trains as one rank does: losses, norms, and final weights."""

import pytest
import torch
import torch.distributed as dist
from cases import close, whole
from ranks import errors, run
from torch import nn
from turnout.dispatch import Meshes
from turnout.models import GPT, GPTConfig, next_token_loss, tensor_parallel
from turnout.moe import MoE, aux_loss, clip_grad_norm_, parallelize, param_groups, sync_gradients

BATCH, LENGTH, STEPS = 4, 8, 3
SIZES = {"vocab": 16, "dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 12, "seq_len": LENGTH}
MOE = {"balance": "global", "shared_experts": 1, "z_loss_weight": 1e-2, "aux_loss_weight": 1e-1}


def build(**options) -> GPT:
    """A dense block and a mixture of experts, alike on every rank."""
    torch.manual_seed(0)
    moe = {**MOE, **options.pop("moe", {})}
    model = GPT(GPTConfig(**{**SIZES, "num_experts": 4, "moe": moe, **options})).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:  # ones would hide a norm that is left out
                p.uniform_(0.5, 1.5)
    return model


def batches() -> torch.Tensor:
    return torch.randint(16, (STEPS, BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def train(model, tokens, sync):
    """What each step's loss, balance loss and gradient norm were."""
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    history = []
    for batch in tokens:
        loss = next_token_loss(model(batch[:, :-1]), batch[:, 1:])
        aux = aux_loss(model)
        (loss + aux).backward()
        sync()
        history.append(torch.stack([loss.detach(), aux.detach(), clip_grad_norm_(model, 0.5)]))
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(history)


def equal_to_one_rank(tp, ep, options, ranks_per_node=None, break_it=None):
    one = build(**options)
    expected = train(one, batches(), lambda: None)
    assert expected[0, 2] > 0.5  # there is something to clip
    meshes = Meshes.of("cpu", tp=tp, ep=ep, ranks_per_node=ranks_per_node)
    model = parallelize(tensor_parallel(build(**options), meshes.dense["tp"]), meshes)
    if break_it:
        break_it(model)
    dp = meshes.dense["dp"]
    mine = batches().chunk(dp.size(), dim=1)[dp.get_local_rank()]
    history = train(model, mine, lambda: sync_gradients(model, meshes))
    dist.all_reduce(history)
    close(history / dist.get_world_size(), expected, 1e-10, "losses and norms")
    for (name, p), q in zip(model.named_parameters(), one.parameters(), strict=True):
        close(whole(p), q.detach(), 1e-9, name)


@pytest.mark.parametrize(("ranks", "tp", "ep"), [(2, 2, 1), (2, 2, 2), (4, 2, 1), (4, 2, 2), (4, 2, 4), (4, 1, 4)])
@pytest.mark.parametrize("balance", ["global", "sequence"])
def test_many_ranks_train_as_one(ranks, tp, ep, balance):
    run(ranks, equal_to_one_rank, tp, ep, {"moe": {"balance": balance}})


OTHERS = {
    "dense": {"moe_every": 0},
    "every block": {"moe_every": 1, "kv_heads": 4},
    "hash": {"moe": {"gate": "hash", "z_loss_weight": 0.0}},
    "hierarchical": {"moe": {"gate": "hierarchical"}},
    "own experts": {"moe": {"experts": lambda: nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 16))}},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_other_models(options):
    run(2, equal_to_one_rank, 2, 2, options)


def test_experts_over_nodes():
    run(4, equal_to_one_rank, 2, 4, {}, 2)
