"""Upcycled experts and adapters on several ranks: what they are on one."""

import copy

import ranks
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, close, tokens, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from turnout.moe import Balance, MoE, aux_loss, fully_shard_experts, parallelize, sync_gradients
from turnout.moe.adapters import add_lora, lora_parameters, merge_lora
from turnout.moe.experts.sharded import held_slice, local
from turnout.moe.experts.shared import FeedForward
from turnout.moe.upcycling import upcycle


def model() -> nn.Module:
    torch.manual_seed(0)
    moe = MoE(WIDTH, 12, EXPERTS, 4, bias=True, balance=Balance(over="global"))
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), moe, nn.Linear(WIDTH, WIDTH)).double()


def dense() -> nn.Module:
    torch.manual_seed(1)
    block = FeedForward(WIDTH, 24, bias=True)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), block, nn.Linear(WIDTH, WIDTH)).double()


def upcycled() -> list[tuple[float, torch.Tensor]]:
    rank, results = dist.get_rank(), []
    x = tokens(10).chunk(2)[rank]
    for sizes in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("ep", "etp"))
        early = parallelize(upcycle(model(), dense(), noise=0.1), mesh)
        late = upcycle(parallelize(model(), mesh), dense(), noise=0.1)
        for mine, theirs in zip(early.parameters(), late.parameters(), strict=True):
            close(whole(mine), whole(theirs), 1e-15)
        y = upcycle(late, dense())(x)
        results.append((float((y - dense()(x)).detach().abs().max()), whole(early[1].experts.w_up)))
    return results


def test_upcycled_before_or_after_experts_are_spread():
    noisy = upcycle(model(), dense(), noise=0.1)[1].experts.w_up
    for results in ranks.run(2, upcycled):
        for difference, w_up in results:
            assert difference < 1e-14
            close(w_up, noisy.detach(), 1e-15)


def adapted(m: nn.Module) -> nn.Module:
    """With adapters, whose B is not zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in lora_parameters(add_lora(m, rank=4, alpha=8.0)).items():
            if name.endswith(".b"):
                local(p).copy_(torch.randn(p.shape, generator=generator)[held_slice(p)])
    return m


def step(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = m(x)
    (y.square().mean() + aux_loss(m)).backward()
    return y.detach()


def spread(how: str):
    x = tokens(10).chunk(2)[dist.get_rank()]
    mesh = init_device_mesh("cpu", (2, 1) if how == "fsdp" else (1, 2), mesh_dim_names=("edp", "ep"))
    m = parallelize(adapted(model()), mesh) if how == "before" else adapted(parallelize(model(), mesh))
    if how == "fsdp":
        fully_shard_experts(m, mesh)
        fully_shard(m, mesh=mesh._flatten("all"))
    y = step(m, x)
    if how != "fsdp":
        sync_gradients(m, mesh)
    trained = lora_parameters(m)
    assert {name for name, p in m.named_parameters() if p.grad is not None} == trained.keys()
    if how != "fsdp":
        close(merge_lora(m)(x), y, 1e-12)
    return y, {name: (whole(p), whole(p.grad)) for name, p in trained.items()}


def test_adapters_learn_as_on_one_rank():
    one = adapted(model())
    y = step(copy.deepcopy(one), tokens(10))
    step(one, tokens(10))
    expected = lora_parameters(one)
    for how in ("before", "after", "fsdp"):
        results = ranks.run(2, spread, how)
        close(torch.cat([part for part, _ in results]), y, 1e-12)
        for _, parameters in results:
            assert parameters.keys() == expected.keys()
            for name, (p, grad) in parameters.items():
                close(p, expected[name].detach(), 1e-15, name)
                close(grad, expected[name].grad, 1e-11, name)
