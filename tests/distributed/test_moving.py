"""Checkpoints of one mesh load on any other to the bit, and training goes on; exports are read by one rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import runnable, whole
from ranks import errors, run
from safetensors.torch import load_file
from test_oracle import CASES, Case, config, micro_batches
from torch.optim import AdamW
from turnout.models import GPT, ParallelModel, checkpoint
from turnout.models.export import INDEX, export, load_exported
from turnout.moe import param_groups

pytestmark = pytest.mark.sampled

ONE = Case(1)
PAIRS = [
    ("pp2 zbv", ONE),
    (ONE, "pp2 interleaved1f1b"),
    ("tp2", "ep2"),
    ("dp2 fsdp", "tp2"),
    ("etp2", "ep2"),
    ("ep4", "ep2"),
    ("ep2", "pp2 tp2"),
    ("dp2 cp2 ep2 fsdp", "tp2"),
    ("pp2 ep2", "dp2 zero1"),
    ("dp2 tp2 ep2 fsdp", "pp2 1f1b"),
    ("pp2 dp2 fsdp", "etp2"),
]


def of(case: Case | str) -> Case:
    return CASES[case] if isinstance(case, str) else case


def build(case: Case, seed: int = 0, **sizes: int) -> tuple[ParallelModel, AdamW]:
    model = case.build("global", seed, **sizes)
    return model, AdamW(param_groups(model), lr=1e-2)


def advance(model: ParallelModel, optimizer: AdamW, step: int) -> float:
    """The loss of a step, over all ranks."""
    dp = model.meshes.dense["dp"]
    mine = torch.cat([batch.chunk(dp.size())[dp.get_local_rank()] for batch in micro_batches(step)])
    loss = model.step(mine[:, :-1], mine[:, 1:]).task
    dist.all_reduce(loss, group=dp.get_group())
    optimizer.step()
    optimizer.zero_grad()
    return float(loss / dp.size())


def contents(model: ParallelModel, optimizer: AdamW) -> dict[str, torch.Tensor]:
    """Every tensor of both, whole, of all stages."""
    mine = {}
    for part in model.parts:
        for name, p in part.named_parameters():
            mine[name] = whole(p)
            mine |= {f"{name} {key}": whole(t) for key, t in optimizer.state[p].items()}
    everyones = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, mine)
    return {name: tensor for each in everyones for name, tensor in each.items()}


def saved(case: Case, folder: Path):
    model, optimizer = build(case)
    for step in range(2):
        advance(model, optimizer, step)
    checkpoint.save(folder, model.parts, optimizer, 2)
    return contents(model, optimizer), advance(model, optimizer, 2)


def loaded(case: Case, folder: Path):
    model, optimizer = build(case, seed=1)
    assert checkpoint.load(folder / "step-2", model.parts, optimizer).step == 2
    return contents(model, optimizer), advance(model, optimizer, 2)


@pytest.mark.parametrize(("before", "after"), runnable(PAIRS), ids=str)
def test_a_checkpoint_loads_on_another_mesh(tmp_path, before, after):
    before, after = of(before), of(after)
    kept, next_loss = run(before.ranks, saved, before, tmp_path)[0]
    for found, loss in run(after.ranks, loaded, after, tmp_path):
        assert found.keys() == kept.keys()
        assert len(kept) == 4 * len(list(GPT(config("global")).parameters()))  # and three values of AdamW's of each
        for name in kept:
            assert torch.equal(found[name], kept[name]), name
        assert loss == pytest.approx(next_loss, rel=1e-11)


def cut_short(folder: Path) -> str:
    """Stages of a model of two layers fewer."""
    model, optimizer = build(Case(2, {"pp": 2}), layers=2)
    before = contents_of_parts(model)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(folder / "step-2", model.parts, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, contents_of_parts(model), strict=True))
    return str(caught.value)


def contents_of_parts(model: ParallelModel) -> list[torch.Tensor]:
    return [whole(p) for p in model.parameters()]


def test_stages_of_another_model_are_refused_on_every_rank(tmp_path):
    run(1, saved, ONE, tmp_path)
    for said in run(2, cut_short, tmp_path):
        assert "step-2 does not load: is it of a model of other sizes?" in said


def exported(case: Case, folder: Path, file_bytes: int):
    model, optimizer = build(case)
    advance(model, optimizer, 0)
    export(model.parts, folder, file_bytes)
    return contents(model, optimizer)


@pytest.mark.parametrize("file_bytes", [5 << 30, 5000])
@pytest.mark.parametrize("name", runnable(["pp2 zbv", "tp2 ep2", "edp2 ep2 fsdp", "ep2 etp2"]))
def test_an_export_is_read_by_one_rank(tmp_path, name, file_bytes):
    kept = run(CASES[name].ranks, exported, CASES[name], tmp_path / "made" / "out", file_bytes)[0]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["out"]
    torch.manual_seed(1)
    model = GPT(config("global")).double()
    load_exported(tmp_path / "made" / "out", model)
    for own, p in model.named_parameters():
        assert torch.equal(p, kept[own]), own
    files = sorted(path for path in (tmp_path / "made" / "out").iterdir() if path.name != INDEX)
    assert {own for file in files for own in load_file(file)} == set(model.state_dict())  # for readers of others
    assert (len(files) > 3) == (file_bytes == 5000)
    for sizes, message in [
        ({"layers": 2}, r"only one of the two has \['blocks\.2"),
        ({"hidden": 8}, r"down.weight is \(16, 36\) in"),
    ]:
        with pytest.raises(checkpoint.CheckpointError, match=message):
            load_exported(tmp_path / "made" / "out", GPT(replace(config("global"), **sizes)))


def again(folder: Path) -> None:
    export(GPT(config("global")), folder)


def test_an_export_replaces_nothing(tmp_path):
    for error in errors(2, again, tmp_path):
        assert error == f"CheckpointError: {tmp_path} exists already; choose another name"
