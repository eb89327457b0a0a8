"""`parallelism` and `shadow` beside FSDP2, DDP, LoRA, autocast and compilation; and what is refused."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, build, close, perceptron, tokens, whole
from ranks import run
from test_weight_travel import alike, layer_on, mesh_of, outcome, shard
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from turnout.moe import MoE, aux_loss, check, expert_parameters, fully_shard_experts, parallelize, sync_gradients
from turnout.moe.adapters import add_lora

CHOICES = [(0, None), (1, (1, 4, 6)), (0, (3,))]
SHARDS = {2: [6, 3], 4: [5, 0, 9, 3]}


def gradients(model: nn.Module, call, x, scale: float, sync=lambda: None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (call(x).square().sum() * scale + aux_loss(model)).backward()
    sync()
    return {name: whole(p.grad) for name, p in model.named_parameters()}


def with_fsdp(model, mesh):
    experts = set(expert_parameters(model).values())
    return fully_shard(model, mesh=mesh._flatten("all"), ignored_params=experts)


def with_ddp(model, mesh):
    DDP._set_params_and_buffers_to_ignore_for_model(model, list(expert_parameters(model)))
    return DDP(model)


def with_all_in_fsdp(model, mesh):
    options = {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float64)}
    return fully_shard(fully_shard_experts(model, mesh, **options), mesh=mesh._flatten("all"), **options)


def wrapped(wrap, shape) -> None:
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh, sizes = init_device_mesh("cpu", shape, mesh_dim_names=("edp", "ep")), SHARDS[math.prod(shape)]
    one, x, ranks = build(), tokens(sum(sizes)), math.prod(shape)
    expected = gradients(one, one, x, 1 / len(x))
    model = parallelize(build(), mesh, parallelism=0)
    call = wrap(model, mesh)
    check(call, mesh, torch.optim.SGD(model.parameters()))
    for r, ids in CHOICES:
        for layer in (model[1], model[3]):
            layer.parallelism, layer.shadow, layer.experts.recompute = r, ids, layer is model[1] and r == 1
        mine = x.split(sizes)[dist.get_rank()]
        sync = partial(sync_gradients, model, mesh, dense=False) if wrap is not with_all_in_fsdp else lambda: None
        found = gradients(model, call, mine, ranks / len(x), sync)
        for name, grad in found.items():
            close(grad, expected[name], 1e-10, name)


@pytest.mark.parametrize(
    ("wrap", "shape"), [(with_fsdp, (1, 2)), (with_ddp, (1, 2)), (with_all_in_fsdp, (2, 2))], ids=["fsdp", "ddp", "all"]
)
def test_gradients_may_be_reduced_by_others(wrap, shape):
    run(math.prod(shape), wrapped, wrap, shape)


def sharded_with_more() -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("edp", "ep"))
    model = parallelize(nn.Sequential(MoE(WIDTH, 12, EXPERTS)), mesh)
    fully_shard(model, mesh=mesh["edp"])
    for choice in ({"parallelism": 0}, {"shadow": [1]}):
        with pytest.raises(ValueError, match=r"as a part of something larger: call fully_shard_experts\(model, mesh\)"):
            setattr(model[0], *next(iter(choice.items())))
    assert (model[0].parallelism, model[0].shadow) == (1, None)


def test_experts_that_fsdp_shards_with_the_rest_are_refused():
    run(2, sharded_with_more)


class Counting(nn.Module):
    """An expert whose forward changes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("rows", torch.zeros(()))

    def forward(self, x):
        self.rows.add_(len(x))
        return self.linear(x)


def of_many_kinds() -> None:
    mesh = mesh_of()
    for kind in (perceptron, "relu2"):
        layer = layer_on(mesh, kind=kind)
        if kind == "relu2":
            add_lora(layer, rank=2)
            with torch.no_grad():
                for name, p in layer.experts.lora.named_parameters():
                    p.to_local().add_(0.1) if name.endswith("b") else None
        expected = outcome(layer)
        for layer.parallelism, layer.shadow in CHOICES:
            alike(outcome(layer), expected)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            close(layer(shard()), expected[0], 1e-10)  # float64 stays
    counting = layer_on(mesh, kind=Counting)
    for counting.parallelism, counting.shadow in CHOICES:
        with pytest.raises(ValueError, match="experts change their buffers in a forward"):
            counting(shard())
    frozen = layer_on(mesh)
    frozen.experts.requires_grad_(False)
    expected = outcome(frozen)
    frozen.parallelism = 0
    alike(outcome(frozen), expected)


def test_kinds_of_experts():
    run(2, of_many_kinds)


def in_half_precision() -> None:
    layer, x = layer_on(mesh_of()).float(), shard().detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = outcome(layer, x)
        layer.parallelism = 0
        for found, given in zip(outcome(layer, x), expected, strict=True):
            close(found.float(), given.float(), float(given.abs().max()) / 128)


def compiled() -> None:
    layer = layer_on(mesh_of())
    expected, graph = outcome(layer), torch.compile(layer, backend="eager")
    for layer.parallelism, layer.shadow in CHOICES:
        alike(outcome(graph), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
def test_autocast_and_compilation():
    run(2, in_half_precision)
    run(2, compiled)


def wrong() -> None:
    mesh = mesh_of((1, 2), ("ep", "etp"))
    layer = layer_on(mesh)
    assert (layer.parallelism, layer.shadow) == (2, None)
    said = r'of layer 0 must be one of 0, 1, 2 on this mesh, which splits each expert into 2 \(etp=2\), or "auto"; got '
    for r in (3, -1, True, 1.0, "all"):
        with pytest.raises(ValueError, match=said):
            layer.parallelism = r
    for ids in ([0, 0], [EXPERTS], [-1], [0.0], [True], "all"):
        with pytest.raises(ValueError, match="shadow of layer 0 must be None or different experts, of 0 to 7, or"):
            layer.shadow = ids
    assert (layer.parallelism, layer.shadow) == (2, None)
    layer.shadow = [5, 2]
    assert layer.shadow == (2, 5)
    with pytest.raises(ValueError, match="must be one of 0, 1, 2 on this mesh"):
        parallelize(nn.Sequential(MoE(WIDTH, 12, EXPERTS)), mesh, parallelism=4)
    model = nn.Sequential(MoE(WIDTH, 12, EXPERTS))
    with pytest.raises(ValueError, match="parallelism is 0 on rank 0, 1 on rank 1"):
        parallelize(model, mesh, parallelism=dist.get_rank())
    assert parallelize(model, mesh, parallelism=1)[0].parallelism == 1
    for name in ("parallelism", "shadow"):
        with pytest.raises(ValueError, match=f"{name} is of a layer that is spread over ranks: call parallelize first"):
            setattr(MoE(WIDTH, 12, EXPERTS), name, [0])


def test_wrong_choices_are_named():
    run(2, wrong)
