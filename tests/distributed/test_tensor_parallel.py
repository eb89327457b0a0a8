"""Any split of layers, sequences and experts trains as one rank does: losses, norms, and final weights."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from cases import close, whole
from ranks import errors, run
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint as recompute
from turnout.dispatch import Meshes
from turnout.models import GPT, GPTConfig, checkpoint, next_token_loss, tensor_parallel
from turnout.moe import (
    Gate,
    Routing,
    aux_loss,
    clip_grad_norm_,
    parallelize,
    param_groups,
    sync_gradients,
)

BATCH, LENGTH, STEPS = 4, 8, 3
SIZES = {"vocab": 16, "dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 12, "seq_len": LENGTH}
MOE = {"balance": "global", "shared_experts": 1, "z_loss_weight": 1e-2, "aux_loss_weight": 1e-1}


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
    return parallelize(tensor_parallel(model, meshes.dense["tp"]), meshes), meshes


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
    run(ranks, equal_to_one_rank, tp, ep, {"moe": {"balance": balance}})


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
    "hash": {"moe": {"gate": "hash", "z_loss_weight": 0.0}},
    "hierarchical": {"moe": {"gate": "hierarchical"}},
    "own experts": {"moe": {"experts": lambda: nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 16))}},
    "local balance": {"moe": {"balance": "local"}},  # over the tokens of the tp ranks together: those of one rank
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


def stages():
    """A model cut in two, one after the other on the same ranks: what travels between them is a part of sequences."""
    one, tokens = build(), batches()[0]
    next_token_loss(one(tokens[:, :-1]), tokens[:, 1:]).backward()
    parts = [build(kept=range(1)), build(kept=range(1, 2))]
    meshes = Meshes.of("cpu", tp=2, ep=2)
    for part in parts:
        parallelize(tensor_parallel(part, meshes.dense["tp"]), meshes)
    x = parts[0](tokens[:, :-1])
    assert x.shape == (BATCH, LENGTH // 2, 16)
    loss = next_token_loss(parts[1](x, tokens=tokens[:, :-1]), tokens[:, 1:])
    loss.backward()
    grads = {}
    for part in parts:
        sync_gradients(part, meshes)
        for name, p in part.named_parameters():
            grads[name] = whole(p.grad) + grads.get(name, 0)  # the embedding is in both
    for name, p in one.named_parameters():
        close(grads[name], p.grad, 1e-12, name)


def test_stages_of_a_pipeline():
    run(2, stages)


def forget_the_router(model):
    model.blocks[1].feed_forward.gate.weight.register_hook(lambda grad: grad * dist.get_rank())


def see_tokens_of_others(model):
    model.blocks[1].feed_forward.register_forward_pre_hook(lambda module, args: (args[0].flip(1),))


@pytest.mark.parametrize("change", [forget_the_router, see_tokens_of_others])
def test_the_comparison_notices(change):
    found = errors(2, equal_to_one_rank, 2, 2, {}, change)
    assert all(error.startswith("AssertionError") for error in found), found


def mixed():
    """A layer of a user's own plan: a bias whose gradient DTensor sums itself, one absent, one plain parameter."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)).double()
    model = copy.deepcopy(one)
    meshes = Meshes.of("cpu", tp=2)
    rows = RowwiseParallel(output_layouts=Replicate())
    parallelize_module(model, meshes.dense["tp"], {"0": ColwiseParallel(), "2": rows}, src_data_rank=None)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    one[:3](x).square().mean().backward()
    mine = x.chunk(2)[meshes.dense["dp"].get_local_rank()]
    model[:3](mine).square().mean().backward()
    sync_gradients(model, meshes)
    for (name, p), q in zip(model.named_parameters(), one.parameters(), strict=True):
        close(whole(p.grad), torch.zeros_like(q) if q.grad is None else q.grad, 1e-12, name)
    one[3].weight.grad = torch.zeros_like(one[3].weight)
    close(clip_grad_norm_(model, 1e-2), clip_grad_norm_(one, 1e-2), 1e-12, "norm")


def test_a_plan_of_ones_own():
    run(4, mixed)


def saved_on(folder, tp, ep):
    model, meshes = spread(build(kv_heads=4), tp=tp, ep=ep)
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    dp = meshes.dense["dp"]
    mine = batches()[0].chunk(dp.size())[dp.get_local_rank()]
    next_token_loss(model(mine[:, :-1]), mine[:, 1:]).backward()
    sync_gradients(model, meshes)
    optimizer.step()
    checkpoint.save(folder, model, optimizer, 1)
    return contents(model, optimizer)


def loaded_on(folder, tp, ep):
    model, _ = spread(build(kv_heads=4), tp=tp, ep=ep)
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    checkpoint.load(folder / "step-1", model, optimizer)
    return contents(model, optimizer)


def contents(model, optimizer):
    return {n: [whole(t) for t in (p, *optimizer.state[p].values())] for n, p in model.named_parameters()}


@pytest.mark.parametrize(("before", "after"), [((2, 2), (1, 1)), ((1, 1), (2, 2)), ((4, 4), (2, 1))], ids=str)
def test_checkpoints_load_on_other_meshes(tmp_path, before, after):
    kept = run(before[0], saved_on, tmp_path, *before)[0]
    found = run(after[0], loaded_on, tmp_path, *after)[0]
    assert kept.keys() == found.keys()
    for name in kept:
        assert all(torch.equal(a, b) for a, b in zip(kept[name], found[name], strict=True)), name


def autocast():
    model, one = spread(build().float(), tp=2, ep=2)[0], build().float()
    tokens, found = batches()[0], []
    for each in (model, one):
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_loss(each(tokens[:, :-1]), tokens[:, 1:])
        (loss + aux_loss(each)).backward()
        found.append(loss.detach())
    close(found[0], found[1], 2e-2, "loss")
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_autocast():
    run(2, autocast)


def failing(what):
    meshes = Meshes.of("cpu", tp=2)
    if what == "not split":
        parallelize(build(), meshes)
    if what == "twice":
        tensor_parallel(tensor_parallel(build(), meshes.dense["tp"]), meshes.dense["tp"])
    if what == "axis":
        tensor_parallel(build(), meshes.dense["dp"])
    if what == "length":
        tensor_parallel(build(), meshes.dense["tp"])(torch.zeros(1, 5, dtype=torch.int64))
    tensor_parallel(build(**what), meshes.dense["tp"])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"kv_heads": 1}, r"kv_heads=1 does not split over tp=2 ranks"),
        ({"vocab": 17}, r"vocab=17 does not split over tp=2 ranks; use a multiple of 2"),
        ({"hidden": 3, "top_k": 1}, r"top_k \* hidden=3 does not split"),
        ("not split", r"call tensor_parallel\(model, meshes.dense\[\"tp\"\]\) first"),
        ("twice", "call tensor_parallel once"),
        ("axis", "needs a mesh with the one axis \"tp\"; got \\('dp',\\)"),
        ("length", "sequences of 5 tokens do not split over tp=2 ranks; pad or cut them to a multiple of 2"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said_on_every_rank(what, message):
    for error in errors(2, failing, what):
        assert error.startswith("ValueError")
        assert re.search(message, error), error
