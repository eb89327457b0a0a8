"""What tensor parallelism sends, keeps and refuses; parts of a model, and plans and checkpoints beside ours."""

import copy
import re
from collections import Counter

import pytest
import torch
from cases import close, whole
from ranks import errors, run
from test_tensor_parallel import BATCH, LENGTH, batches, build, spread
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from turnout.dispatch import Meshes
from turnout.models import checkpoint, next_token_loss, tensor_parallel
from turnout.moe import aux_loss, clip_grad_norm_, parallelize, param_groups, sync_gradients
from turnout.moe.layer import moe_layers


def stages():
    """A model cut in two, one after the other on the same ranks: what travels between them is a part of sequences."""
    one, tokens = build(), batches()[0]
    next_token_loss(one(tokens[:, :-1]), tokens[:, 1:]).backward()
    parts = [build(kept=range(1)), build(kept=range(1, 2))]
    meshes = Meshes.of("cpu", tp=2, ep=2)
    for part in parts:
        tensor_parallel(part, meshes.dense["tp"])
        if moe_layers(part):
            parallelize(part, meshes)
    (x,) = parts[0](tokens[:, :-1])
    assert x.shape == (BATCH, LENGTH // 2, 16)
    loss = next_token_loss(parts[1](tokens[:, :-1], hidden=(x,)), tokens[:, 1:])
    loss.backward()
    grads = {}
    for part in parts:
        sync_gradients(part, meshes)
        for name, p in part.named_parameters():
            assert p.grad.placements == p.placements, name
            grads[name] = whole(p.grad) + grads.get(name, 0)  # the embedding is in both
    for name, p in one.named_parameters():
        close(grads[name], p.grad, 1e-12, name)


def test_stages_of_a_pipeline():
    run(2, stages)


class Collectives(TorchDispatchMode):
    """Counts them, by name, below DTensor."""

    def __init__(self) -> None:
        super().__init__()
        self.number: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional") and not func._opname.startswith(("wait", "_wrap")):
            self.number[func._opname] += 1
        return func(*args, **(kwargs or {}))


def exchanges(moe_every):
    """Of the forward of one block more: the model of two, less that of one."""
    counts = []
    for layers in (2, 1):
        model, tokens = spread(build(layers=layers, moe_every=moe_every), tp=2, ep=2)[0], batches()[0]
        with Collectives() as seen:
            model(tokens[:, :-1])
        counts.append(seen.number)
    return {op: number - counts[1].get(op, 0) for op, number in counts[0].items()}


def test_a_mixture_of_experts_gathers_no_sequence():
    dense, moe = run(2, exchanges, 0)[0], run(2, exchanges, 1)[0]
    assert dense == {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 2}
    assert moe["all_gather_into_tensor"] == moe["reduce_scatter_tensor"] == 1  # those of attention
    assert moe["alltoall_base_"] > 0


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
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            close(whole(p.grad), q.grad, 1e-12, name)
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
    if what == "nothing":
        tensor_parallel(build(), meshes.dense["tp"])(torch.zeros(0, 4, dtype=torch.int64))
    if what == "length":
        tensor_parallel(build(), meshes.dense["tp"])(torch.zeros(1, 5, dtype=torch.int64))
    if what == "second derivative":
        model, tokens = tensor_parallel(build(), meshes.dense["tp"]), torch.zeros(1, 4, dtype=torch.int64)
        next_token_loss(model(tokens), tokens).backward(create_graph=True)
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
        ("second derivative", "the loss of split logits has no second derivative: leave out create_graph=True"),
        ("nothing", r"tokens \(0, 4\) have no elements, which tp=2 cannot split"),
        ("length", "sequences of 5 tokens do not split over tp=2 ranks; pad or cut them to a multiple of 2"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said_on_every_rank(what, message):
    for error in errors(2, failing, what):
        assert error.startswith("RuntimeError" if what == "second derivative" else "ValueError")
        assert re.search(message, error), error
