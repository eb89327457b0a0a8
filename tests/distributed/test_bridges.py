"""A Hugging Face model with its experts spread over ranks computes what it computes on one, and is saved like it."""

from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from turnout.models.hf import replace_moe, restore_moe, save_pretrained
from turnout.moe import fully_shard_experts, parallelize, sync_gradients

pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[hf]"')
import hf_walk
from hf_families import FAMILIES, batch, tiny

OTHERWISE = ("jetmoe", "longcat_flash")  # other names; rows for experts that have no parameters
IDS = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(5))


def step(family: str, ids: torch.Tensor, mesh=None, parallelism: int | None = None):
    model = tiny(family) if family in FAMILIES else hf_walk.tiny(family)
    if mesh is not None:
        parallelize(replace_moe(model), mesh, dispatcher="flat", parallelism=parallelism)
    out = model(input_ids=ids, labels=ids.roll(1, 1))
    out.loss.backward()
    if mesh is not None:
        sync_gradients(model, mesh)
        held = sum(p.to_local().numel() for p in model.parameters() if hasattr(p, "to_local"))
        restore_moe(model)
        whole = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        assert held * mesh.size() == whole or family in OTHERWISE
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return out.logits.detach(), grads, model.state_dict()


def on_a_rank(family: str, parallelism: int | None):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    return step(family, IDS.chunk(mesh.size())[mesh.get_local_rank()], mesh, parallelism)


@pytest.mark.parametrize(
    ("family", "number", "parallelism"),
    [("mixtral", 4, 0), ("dbrx", 2, 0)]
    + [
        (f, 2, None)
        for f in ("mixtral", "dbrx", "switch_transformers", "minimax_m2", "nemotron_h", "gemma4", *OTHERWISE)
    ],
)
def test_spread_experts_equal_one_rank(family, number, parallelism):
    logits, grads, state = step(family, IDS)
    results = ranks.run(number, on_a_rank, family, parallelism)
    torch.testing.assert_close(torch.cat([part for part, _, _ in results]), logits, rtol=1e-5, atol=1e-5)
    for _, theirs, weights in results:
        assert theirs.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(theirs[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()), msg=name)
        assert weights.keys() == state.keys()
        assert all(torch.equal(weights[name], state[name]) for name in state)


SAVED = [  # family, mesh, and whether FSDP2 shards all of it
    ("mixtral", {"edp": 2, "ep": 2}, True),
    ("gpt_oss", {"ep": 4}, False),
    ("dbrx", {"node": 2, "local": 2}, False),
    ("switch_transformers", {"edp": 2, "ep": 2}, False),
]


def save(folder: Path) -> list[str]:
    """Save each case amid a step, and say what is another afterwards."""
    changed = []
    for family, sizes, sharded in SAVED:
        mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        model = parallelize(replace_moe(tiny(family)), mesh, dispatcher="flat")
        if sharded:
            fully_shard_experts(model, mesh)
            fully_shard(model, mesh=mesh._flatten())
        expected = model(**batch(family))  # of FSDP's root, the parameters are whole now
        expected.loss.backward()
        before = {name: (p, p.grad) for name, p in model.named_parameters()}
        with torch.no_grad():
            model(**batch(family))
        save_pretrained(model, folder / family)
        after = {name: (p, p.grad) for name, p in model.named_parameters()}
        same = before.keys() == after.keys() and all(
            a is b for n in before for a, b in zip(before[n], after[n], strict=True)
        )
        if not same or not torch.equal(model(**batch(family)).logits, expected.logits):
            changed.append(family)
    return changed


def test_the_familys_format_from_any_mesh(tmp_path):
    assert ranks.run(4, save, tmp_path / "spread") == [[]] * 4
    for family, _, _ in SAVED:
        tiny(family).save_pretrained(tmp_path / "plain" / family)
        plain, spread = (sorted((tmp_path / kind / family).iterdir()) for kind in ("plain", "spread"))
        assert [path.name for path in plain] == [path.name for path in spread]
        assert [path.read_bytes() for path in plain] == [path.read_bytes() for path in spread]


def save_to_a_file(path: Path) -> None:
    model = parallelize(replace_moe(tiny("olmoe")), init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)))
    save_pretrained(model, path / "folder")


def test_a_save_that_fails_fails_on_every_rank(tmp_path):
    (tmp_path / "file").touch()
    for error in ranks.errors(2, save_to_a_file, tmp_path / "file"):
        assert error.startswith("CheckpointError: rank 0: NotADirectoryError")
