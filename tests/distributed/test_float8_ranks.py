"""Experts in float8 on many ranks: on every mesh and transport they compute what one rank computes.

A row's scale is its own, so spreading rows and experts changes nothing. Scales are powers of two, so a slice of a row
or of a column is rounded as the whole, but for numbers below 2^-14 of the largest. Tests take numbers of few bits, so
that sums are exact in any order: otherwise another order would turn a cast now and then. Tokens differ in size by 2^20,
so that a scale for more than a row would make small ones zero.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import runnable
from ranks import run
from reference import close
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from turnout.models import GPT, GPTConfig, next_token_loss
from turnout.models.pipeline.engine import Pipeline
from turnout.models.pipeline.partition import Stages
from turnout.models.recompute import recompute
from turnout.moe import Balance, Capacity, MoE, aux_loss, fully_shard_experts, parallelize, sync_gradients
from turnout.moe.experts.sharded import whole

D, H, E, k = 32, 48, 4, 2
UNEVEN, ALL_ON_ONE = (7, 0, 9, 1), (17, 0, 0, 0)
EXACT = 1e-6
EP, NODES, ETP = {"ep": 4}, {"node": 2, "local": 2}, {"ep": 2, "etp": 2}


@dataclass(frozen=True)
class Case:
    axes: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)  # of parallelize
    choices: dict[str, Any] = field(default_factory=dict)  # set on the layer afterwards
    layer: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[int, ...] = UNEVEN
    limit: float = EXACT
    crowded: bool = False  # all tokens choose the same experts


CASES = {  # tests without --all keep each eighth
    "flat": Case(EP),
    "flat, all tokens on one rank": Case(EP, sizes=ALL_ON_ONE),
    "flat, experts without rows": Case(EP, crowded=True),
    "flat, padded": Case(EP, layer={"capacity": Capacity(float(E), pad=True)}),
    "flat, plain experts with biases": Case(EP, layer={"experts": "relu2", "bias": True}),
    "flat, in chunks": Case(EP, {"overlap": 2}),
    "flat, in rounds": Case(EP, {"max_rows": 12}, crowded=True),
    "2dh": Case(NODES, {"dispatcher": "2dh"}, crowded=True),
    "etp": Case(ETP),
    "node": Case(NODES, {"dispatcher": "node", "overlap": 2}),
    "etp, one visit": Case(ETP, {"parallelism": 1}),
    "weights travel": Case(EP, {"parallelism": 0}),
    "shadowed": Case(EP, choices={"shadow": [0, 2]}),
    "recomputed": Case(EP, choices={"recompute": True}),
    "fsdp": Case({"edp": 2, "ep": 2}),
    "wire bf16": Case(EP, {"wire": "bf16"}, limit=2**-6),
    "weights travel to split experts": Case(ETP, {"parallelism": 0}),
    "wire fp8": Case(EP, {"wire": "fp8"}, limit=2**-2),
}


def few_bits(*shape: int, seed: int) -> Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)) / 4


def build(case: Case) -> nn.Module:
    layer = MoE(D, H, E, k, seed=0, balance=0, **case.layer)
    with torch.no_grad():
        for seed, (name, p) in enumerate(layer.named_parameters()):
            p.copy_(few_bits(*p.shape, seed=seed) * (0.0 if case.crowded and "gate" in name else 1.0))
    layer.experts.precision = "fp8"
    return nn.Sequential(layer, nn.LeakyReLU(1.0))  # the identity, but FSDP2 wants no view


def spread(case: Case) -> tuple[nn.Module, Any]:
    model, mesh = build(case), init_device_mesh("cpu", tuple(case.axes.values()), mesh_dim_names=tuple(case.axes))
    parallelize(model, mesh, **case.options)
    for name, value in case.choices.items():
        setattr(model[0].experts if name == "recompute" else model[0], name, value)
    if "edp" in case.axes:
        fully_shard_experts(model, mesh)
        fully_shard(model)
    return model, mesh


def step(model: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(grad)
    return {"y": y.detach(), "x": torch.zeros_like(x) if x.grad is None else x.grad}


def on_four(case: Case) -> None:
    T, rank = sum(case.sizes), dist.get_rank()
    size = 2.0 ** torch.randint(-18, 3, (T, 1), generator=torch.Generator().manual_seed(99))
    x, grad = few_bits(T, D, seed=100) * size, few_bits(T, D, seed=101) * size.flip(0)
    one, (many, mesh) = build(case), spread(case)
    expected = {name: t.split(case.sizes)[rank] for name, t in step(one, x, grad).items()}
    found = step(many, x.split(case.sizes)[rank], grad.split(case.sizes)[rank])
    for name, t in expected.items():
        by = t.abs().amax(1, keepdim=True).clamp(min=2.0**-100)  # so that small rows count as large ones do
        expected[name], found[name] = t / by, found[name] / by
    if "edp" not in case.axes:
        sync_gradients(many, mesh)
    for (name, p), q in zip(one.named_parameters(), many.parameters(), strict=True):
        assert p.grad is not None
        expected[name], found[name] = p.grad / 4, whole(torch.zeros_like(q) if q.grad is None else q.grad)
    for name, value in expected.items():
        assert close(found[name], value, case.limit), (name, (found[name] - value).abs().max() / value.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_four_ranks_compute_what_one_does(name):
    run(4, on_four, CASES[name])


CONFIG = GPTConfig(
    vocab=24, dim=8, layers=4, heads=2, hidden=8, seq_len=6, num_experts=4, moe={"balance": Balance(0.3, over="global")}
)
PARTS = 4  # micro-batches


def in_float8(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, MoE):
            module.experts.precision = "fp8"
    return model


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(24, (8, 7), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def in_stages(schedule: str, activations: str, expected: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    stages = Stages.of(CONFIG, schedule, dist.get_world_size())
    parts = [in_float8(part) for part in stages.build(dist.get_rank())]
    for part in parts if activations else ():
        recompute(part, activations)
    Pipeline(parts, stages, dist.group.WORLD, PARTS).step(*batch())
    for part in parts:
        for name, p in part.named_parameters():
            assert p.grad is not None
            assert close(p.grad, expected[name], 1e-5), name


@pytest.mark.parametrize(
    ("schedule", "activations"), runnable([("zbv", ""), ("interleaved_zb", ""), ("1f1b", "full"), ("zbv", "selective")])
)
def test_stages_compute_what_one_rank_does(schedule, activations):
    """Micro-batches are the same tensors on any number of stages, so that casts are the same as well."""
    torch.manual_seed(0)
    one = in_float8(GPT(CONFIG))
    for tokens, targets in zip(*(part.chunk(PARTS) for part in batch()), strict=True):
        ((next_token_loss(one(tokens), targets) + aux_loss(one)) / PARTS).backward()
    run(2, in_stages, schedule, activations, {name: p.grad for name, p in one.named_parameters()})
