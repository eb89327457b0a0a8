"""A Hugging Face model with its experts spread over ranks computes what it computes on one."""

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from turnout.models.bridges import replace_moe, restore_moe
from turnout.moe import parallelize, sync_gradients

pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[hf]"')
from hf_families import tiny

IDS = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(5))


def step(family: str, ids: torch.Tensor, mesh=None):
    model = tiny(family)
    if mesh is not None:
        parallelize(replace_moe(model), mesh, dispatcher="flat")
    out = model(input_ids=ids, labels=ids.roll(1, 1))
    out.loss.backward()
    if mesh is not None:
        sync_gradients(model, mesh)
        held = sum(p.to_local().numel() for p in model.parameters() if hasattr(p, "to_local"))
        restore_moe(model)
        whole = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        assert held * mesh.size() == whole
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return out.logits.detach(), grads, model.state_dict()


def on_a_rank(family: str):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    return step(family, IDS.chunk(mesh.size())[mesh.get_local_rank()], mesh)


@pytest.mark.parametrize(
    ("family", "number"), [("mixtral", 2), ("mixtral", 4), ("dbrx", 2), ("switch_transformers", 2)]
)
def test_spread_experts_equal_one_rank(family, number):
    logits, grads, state = step(family, IDS)
    results = ranks.run(number, on_a_rank, family)
    torch.testing.assert_close(torch.cat([part for part, _, _ in results]), logits, rtol=1e-5, atol=1e-5)
    for _, theirs, weights in results:
        assert theirs.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(theirs[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()), msg=name)
        assert weights.keys() == state.keys()
        assert all(torch.equal(weights[name], state[name]) for name in state)
