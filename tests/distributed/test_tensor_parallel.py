"""Any split of layers, sequences and experts trains as one rank does: losses, norms, and final weights."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from cases import close, whole
from ranks import errors, run
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint as recompute
from turnout.dispatch import Meshes
from turnout.models import GPT, GPTConfig, next_token_loss, tensor_parallel
from turnout.moe import (
    Balance,
    Gate,
    Residual,
    Routing,
    aux_loss,
    clip_grad_norm_,
    fully_shard_experts,
    parallelize,
    param_groups,
    sync_gradients,
)
from turnout.moe.layer import moe_layers

pytestmark = pytest.mark.sampled

BATCH, LENGTH, STEPS = 4, 8, 3
SIZES = {"vocab": 16, "dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 12, "seq_len": LENGTH}
MOE = {"balance": Balance(1e-1, over="global", z_loss=1e-2), "shared": 1}


def build(kept=None, **options) -> GPT:
    """A dense block and a mixture of experts, alike on every rank."""
    torch.manual_seed(0)
    moe = copy.deepcopy({**MOE, **options.pop("moe", {})})  # a gate belongs to one model
    model = GPT(GPTConfig(**{**SIZES, "num_experts": 4, "moe": moe, **options}), kept).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:  # ones would hide a norm that is left out
                p.copy_(1 + torch.arange(16).cos() / 2)
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


def spread(model, **sizes):
    meshes = Meshes.of("cpu", **sizes)
    tensor_parallel(model, meshes.dense["tp"])
    return parallelize(model, meshes) if moe_layers(model) else model, meshes


def equal_to_one_rank(tp, ep, options, change=lambda model: None, **sizes):
    """`change` is made to the model of many ranks alone."""
    one = build(**options)
    expected = train(one, batches(), lambda: None)
    assert expected[0, 2] > 0.5  # there is something to clip
    model, meshes = spread(build(**options), tp=tp, ep=ep, **sizes)
    change(model)
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
    run(ranks, equal_to_one_rank, tp, ep, {"moe": {"balance": replace(MOE["balance"], over=balance)}})


class OwnGate(Gate):
    """A user's: two matrices, and a loss of its own that is a mean over tokens."""

    def __init__(self):
        super().__init__(16, 4, top_k=2)
        self.inner = nn.Linear(16, 16)

    def forward(self, x):
        scores = self.logits(torch.tanh(self.inner(x))).softmax(-1)
        weight, expert = scores.topk(2)
        return Routing(expert, weight, scores, scores.log(), {"entropy": torch.special.entr(scores).sum(1).mean()})


def own_gate():
    equal_to_one_rank(2, 2, {"moe": {"gate": OwnGate()}})


OTHERS = {
    "dense": {"moe_every": 0},
    "every block": {"moe_every": 1, "kv_heads": 4},
    "hash": {"moe": {"gate": "hash", "balance": Balance(1e-1, over="global")}},
    "hierarchical": {"moe": {"gate": "hierarchical"}},
    "residual": {"moe": {"shared": Residual(1)}},
    "own experts": {"moe": {"experts": lambda: nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 16))}},
    # over the tokens of the tp ranks together: those of one rank
    "local balance": {"moe": {"balance": replace(MOE["balance"], over="local")}},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_other_models(options):
    run(2, equal_to_one_rank, 2, 2, options)


def test_a_gate_of_ones_own():
    run(2, own_gate)


def other_axes(tp, ep, sizes):
    equal_to_one_rank(tp, ep, {}, **sizes)


@pytest.mark.parametrize(("tp", "ep", "sizes"), [(2, 4, {"ranks_per_node": 2}), (2, 2, {"etp": 2})], ids=str)
def test_experts_over_nodes_and_split_inside(tp, ep, sizes):
    run(4, other_axes, tp, ep, sizes)


def recomputed_blocks(model):
    for block in model.blocks:
        block.forward = lambda *args, own=block.forward: recompute(own, *args, use_reentrant=False)


def test_recomputation():
    run(2, equal_to_one_rank, 2, 2, {}, recomputed_blocks)


def forget_the_router(model):
    model.blocks[1].feed_forward.gate.weight.register_hook(lambda grad: grad * dist.get_rank())


def see_tokens_of_others(model):
    model.blocks[1].feed_forward.register_forward_pre_hook(lambda module, args: (args[0].flip(1),))


@pytest.mark.parametrize("change", [forget_the_router, see_tokens_of_others])
def test_the_comparison_notices(change):
    found = errors(2, equal_to_one_rank, 2, 2, {}, change)
    assert all(error.startswith("AssertionError") for error in found), found


def fsdp():
    one = build()
    expected = train(one, batches(), lambda: None)
    model, meshes = spread(build(), tp=2, ep=2)
    dp = meshes.dense["dp"]
    fully_shard_experts(model, meshes)
    for block in model.blocks:
        fully_shard(block, mesh=dp)
    fully_shard(model, mesh=dp)
    history = train(model, batches().chunk(2, dim=1)[dp.get_local_rank()], lambda: None)
    dist.all_reduce(history)
    close(history / 4, expected, 1e-10, "losses and norms")
    for (name, p), q in zip(model.named_parameters(), one.parameters(), strict=True):
        close(whole(p), q.detach(), 1e-9, name)


def test_fsdp_may_reduce_instead():
    run(4, fsdp)
