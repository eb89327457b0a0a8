"""Runs with adapters on several ranks: experts in 4 bits, and checkpoints that leave the frozen base out."""

from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, close, tokens, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from turnout.models.checkpoint import CheckpointError, load, save
from turnout.moe import MoE, aux_loss, fully_shard_experts, parallelize, sync_gradients
from turnout.moe.adapters import add_lora, lora_parameters, quantize_experts, use_lora
from turnout.moe.experts.sharded import held_slice, local


def model(base=0) -> nn.Module:
    torch.manual_seed(base)
    moe = MoE(WIDTH, 12, EXPERTS, 4, bias=True)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), moe, nn.Linear(WIDTH, WIDTH)).double()


def adapted(m: nn.Module, name: str = "default") -> nn.Module:
    """With adapters, whose B is not zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for own, p in lora_parameters(add_lora(m, 4, name=name), name).items():
            if own.endswith(".b"):
                local(p).copy_(torch.randn(p.shape, generator=generator)[held_slice(p)])
    return m


def learned(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = m(x)
    (y.square().mean() + 0.0 * aux_loss(m)).backward()
    return y.detach()


def of_ranks(how: str):
    x = tokens(10).chunk(2)[dist.get_rank()]
    mesh = init_device_mesh("cpu", (2, 1) if how == "fsdp" else (1, 2), mesh_dim_names=("edp", "ep"))
    if how == "after":
        m = adapted(quantize_experts(parallelize(model(), mesh)))
    else:
        m = parallelize(adapted(quantize_experts(model())), mesh)
    if how == "fsdp":
        fully_shard_experts(m, mesh)
        fully_shard(m, mesh=mesh._flatten("all"))
    y = learned(m, x)
    if how != "fsdp":
        sync_gradients(m, mesh)
    return y, {name: whole(p.grad) for name, p in lora_parameters(m).items()}, local(m[1].experts.w_up.packed).shape[0]


@pytest.mark.parametrize("how", ["before", "after", "fsdp"])
def test_four_bits_on_ranks_learn_as_on_one(how):
    pytest.importorskip("bitsandbytes", reason='needs bitsandbytes: pip install -e ".[qlora]"')
    one = adapted(quantize_experts(model()))
    y = learned(one, tokens(10))
    results = ranks.run(2, of_ranks, how)
    close(torch.cat([part for part, *_ in results]), y, 1e-12)
    for _, grads, held in results:
        assert held == (EXPERTS if how == "fsdp" else EXPERTS // 2)
        for name, p in lora_parameters(one).items():
            close(grads[name], p.grad, 1e-6, name)


def train(m: nn.Module, optimizer: torch.optim.Optimizer, mesh=None, steps: int = 1) -> None:
    for _ in range(steps):
        learned(m, tokens(6))
        if mesh is not None:
            sync_gradients(m, mesh)
        optimizer.step()
        optimizer.zero_grad()


def run_of(four_bits: bool, base: int = 0, everything: bool = False, mesh=None):
    m = model(base)
    m = quantize_experts(m) if four_bits else m
    m = m if mesh is None else parallelize(m, mesh)
    if not everything:
        add_lora(add_lora(m, 4), 2, name="second")
        use_lora(m, "default")
    return m, torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)


def saved(folder: Path, four_bits: bool) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("edp", "ep"))
    m, optimizer = run_of(four_bits, mesh=mesh)
    train(m, optimizer, mesh, 2)
    save(folder, m, optimizer, 2)
    train(m, optimizer, mesh)
    return {name: whole(p) for name, p in m.named_parameters()}


@pytest.mark.parametrize("four_bits", [False, True])
def test_a_checkpoint_has_adapters_and_optimizer_and_no_base(four_bits, tmp_path):
    if four_bits:
        pytest.importorskip("bitsandbytes", reason='needs bitsandbytes: pip install -e ".[qlora]"')
    later, _ = ranks.run(2, saved, tmp_path, four_bits)
    m, optimizer = run_of(four_bits)
    metadata = torch.distributed.checkpoint.FileSystemReader(tmp_path / "step-2").read_metadata()
    names = {name.removeprefix("model.") for name in metadata.state_dict_metadata if name.startswith("model.")}
    assert names == lora_parameters(m).keys() | dict(m.named_buffers()).keys()
    load(tmp_path / "step-2", m, optimizer)
    train(m, optimizer)
    for name, p in m.named_parameters():
        close(p.detach(), later[name], 1e-9 if p.is_floating_point() else 0, name)


def elsewhere(folder: Path) -> list[str]:
    """What another base says, one of another dtype, and the same one."""
    told = []
    for base, dtype in ((1, torch.float64), (1, torch.float32), (0, torch.float64)):
        m, _ = run_of(False, base)
        m = parallelize(m.to(dtype), init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)))
        before = {name: whole(p).clone() for name, p in m.named_parameters()}
        try:
            load(folder, m, torch.optim.AdamW(lora_parameters(m, "default").values()))
        except CheckpointError as error:
            told.append(str(error))
            assert all(torch.equal(whole(p), before[name]) for name, p in m.named_parameters())
        else:
            told.append("")
    return told


def test_another_base_is_refused(tmp_path):
    m, optimizer = run_of(False)
    train(m, optimizer)
    path = save(tmp_path, m, optimizer, 1)
    for other, narrow, same in ranks.run(2, elsewhere, path):
        assert "adapters of another base" in other
        assert "0.weight" in other
        assert (narrow, same) == ("", "")


def test_with_and_without_a_base(tmp_path):
    m, optimizer = run_of(False, base=1, everything=True)
    train(m, optimizer)
    save(tmp_path / "all", m, optimizer, 1)
    adapters, its = run_of(False)
    train(adapters, its)
    save(tmp_path / "adapters", adapters, its, 1)
    with pytest.raises(CheckpointError, match=r"the model has no .*lora"):
        load(tmp_path / "adapters" / "step-1", m, optimizer)
    with pytest.raises(CheckpointError, match=r"the checkpoint has no .*lora"):
        load(tmp_path / "all" / "step-1", adapters, its)


def test_a_checkpoint_that_has_the_base_too_is_read(tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr("turnout.models.checkpoint.contents.frozen_base", lambda modules: {})  # as it once was
        m, optimizer = run_of(False, base=1)
        save(tmp_path, m, optimizer, 1)
    other, its = run_of(False)
    load(tmp_path / "step-1", other, its)
    for name, p in m.named_parameters():
        assert torch.equal(other.get_parameter(name), p), name
