"""Checkpoints come back bit for bit, or are refused with the file's name and nothing changed."""

import os
import resource
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import build, tokens, whole
from checkpoints import names
from hypothesis import given
from hypothesis import strategies as st
from ranks import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from turnout.models import checkpoint
from turnout.models.checkpoint import CheckpointError, DamagedError, load, load_newest, newest, prune, save, snapshot
from turnout.models.checkpoint.verify import read_list
from turnout.moe import aux_loss, parallelize, param_groups, sync_gradients


@pytest.fixture
def alone():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trainer(steps: int = 0, model: nn.Module | None = None):
    """Model and optimizer on a mesh of all ranks, `steps` in."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (1, ranks) if ranks != 3 else (3, 1), mesh_dim_names=("edp", "ep"))
    optimizer = torch.optim.AdamW(param_groups(model := parallelize(model or build(), mesh)), lr=1e-2)
    for step in range(steps):
        ((model(tokens(6) + step).square().mean() + aux_loss(model)) / ranks).backward()
        sync_gradients(model, mesh)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def scrambled() -> nn.Module:
    return build().apply(lambda m: [p.data.add_(1) for p in m.parameters(recurse=False)])


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Every tensor of both, whole."""
    out = {name: whole(t) for name, t in model.state_dict().items()}
    for name, p in model.named_parameters():
        out |= {f"{name}.{key}": whole(t) for key, t in optimizer.state.get(p, {}).items()}
    return out


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def write(folder: Path, *steps: int):
    """A checkpoint after each of these numbers of steps; returns the bits at the last."""
    for step in steps:
        pair, rank = trainer(step), dist.get_rank()
        own = {"rng": torch.get_rng_state(), "seen": [rank, 7], "third": torch.tensor(rank / 3)}
        save(folder, *pair, step, {"log": [1, 2.5, None], "step": step}, own)
    return bits(*pair)


def read(path: Path):
    """Into a model that has other weights and no optimizer state."""
    pair = trainer(model=scrambled())
    return load(path, *pair), bits(*pair)


def with_bit(data: bytes, bit: int) -> bytes:
    at = bit // 8
    return data[:at] + bytes([data[at] ^ 1 << bit % 8]) + data[at + 1 :]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict]:
    """A checkpoint of 2 ranks, and what is in it."""
    folder = tmp_path_factory.mktemp("two")
    return folder / "step-2", run(2, write, folder, 2)[0]


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "step-2"))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_two_ranks_checkpoint_comes_back_bit_for_bit_on_any_number(saved, ranks):
    for rank, ((step, extra, own), got) in enumerate(run(ranks, read, saved[0])):
        same(got, saved[1])
        assert (step, extra) == (2, {"log": [1, 2.5, None], "step": 2})
        assert (own is None) == (ranks != 2)
        if own:
            assert own["seen"] == [rank, 7]
            assert torch.equal(own["third"], torch.tensor(rank / 3))
            torch.Generator().set_state(own["rng"])


def test_training_goes_on_as_if_it_had_not_stopped(alone, tmp_path):
    write(tmp_path, 2)
    model, optimizer = trainer(model=scrambled())
    (model(tokens(3)).sum() + aux_loss(model)).backward()  # gradients, and an optimizer that never stepped
    loaded = load(newest(tmp_path), model, optimizer)
    assert (loaded.step, loaded.rank_state["seen"]) == (2, [0, 7])
    expected, goal = trainer(2)
    for m, o in ((model, optimizer), (expected, goal)):
        (m(tokens(6)).square().mean() + aux_loss(m)).backward()
        o.step()
    same(bits(model, optimizer), bits(expected, goal))
    assert load(save(tmp_path / "made" / "for it", model, optimizer, 1), model, optimizer) == (1, {}, None)


def refusal(path: Path) -> str:
    """What load says; no bit of the trained model differs."""
    pair = trainer(1, scrambled())
    before = bits(*pair)
    with pytest.raises(DamagedError) as caught:
        load(path, *pair)
    same(bits(*pair), before)
    return str(caught.value)


def test_a_file_torn_anywhere_or_missing_is_refused(alone, copy):
    assert {"rank-0.pt", "rank-1.pt", ".metadata", "__0_0.distcp", "__1_0.distcp", "checksums.json"} == {*names(copy)}
    for file in list(copy.iterdir()):
        data = file.read_bytes()
        for size in (0, 1, len(data) // 3, len(data) - 1):
            file.write_bytes(data[:size])
            words = "is torn or has" if file.name == "checksums.json" else f"is torn: {size} of {len(data)} bytes"
            assert refusal(copy).startswith(f"{file} {words}")
        file.write_bytes(data + b"\0")
        assert refusal(copy).startswith(f"{file} is torn")
        file.unlink()
        assert refusal(copy) == f"{file} cannot be read: No such file or directory"
        file.write_bytes(data)
    load(copy, *trainer())


def test_one_flipped_bit_anywhere_is_refused(alone, copy):
    @given(st.sampled_from(names(copy)), st.floats(0, 1, exclude_max=True))
    def flip(name, where):
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(with_bit(data, int(where * 8 * len(data))))
        said = refusal(copy)
        assert said.startswith(f"{copy / name} ")
        assert "flipped bits" in said
        (copy / name).write_bytes(data)

    flip()


def test_every_bit_of_the_manifest_counts(saved):
    data, file = (saved[0] / "checksums.json").read_bytes(), mock.MagicMock(__str__=lambda _: "checksums")
    others = [b"{}", b"[]", b"null", b"3", b'{"files": {}}', b'{"files": {}, "sha256": ""}', b"\xff"]
    for file.read_bytes.return_value in [*others, *(with_bit(data, bit) for bit in range(8 * len(data)))]:
        with pytest.raises(DamagedError, match="checksums"):
            read_list(file)


@pytest.mark.sampled
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_says_the_same_whoever_saw_the_damage(copy, ranks):
    for name in ("__0_0.distcp", "__1_0.distcp", "rank-1.pt", "checksums.json"):  # read by different ranks
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(with_bit(data, 99))
        (said,) = {*run(ranks, refusal, copy)}
        assert said.startswith(f"{copy / name} ")
        (copy / name).write_bytes(data)


def test_the_newest_intact_one_is_loaded_and_what_was_passed_over_is_said(alone, tmp_path, caplog):
    pair = trainer(3, scrambled())
    (tmp_path / "step-30.incomplete").mkdir()
    assert load_newest(tmp_path, *pair) is newest(tmp_path) is load_newest(tmp_path / "none", *pair) is None
    write(tmp_path, 1, 2, 10)
    os.truncate(tmp_path / "step-10" / "__0_0.distcp", 5000)
    assert load_newest(tmp_path, *pair).step == 2
    same(before := bits(*pair), bits(*trainer(2)))
    (message,) = (record.message for record in caplog.records if record.name == checkpoint.__name__)
    assert "step-10/__0_0.distcp is torn: 5000 of" in message
    assert names(tmp_path) == ["step-1", "step-10", "step-2"]  # nothing is deleted
    (tmp_path / "step-2" / "checksums.json").unlink()
    (tmp_path / "step-1" / "rank-0.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-10/.*step-2/checksums\.json.*step-1/rank-0\.pt is torn") as caught:
        load_newest(tmp_path, *pair)
    assert not isinstance(caught.value, DamagedError)
    same(bits(*pair), before)


def test_damage_that_is_in_the_way_is_set_aside(alone, tmp_path):
    write(tmp_path, 1)
    with pytest.raises(CheckpointError, match="step-1 exists already"):
        write(tmp_path, 1)
    for text in (b"bad", b"worse"):  # the last is kept
        (tmp_path / "step-1" / ".metadata").write_bytes(text)
        same(write(tmp_path, 1), read(tmp_path / "step-1")[1])
        assert names(tmp_path) == ["step-1", "step-1.damaged"]
        assert (tmp_path / "step-1.damaged" / ".metadata").read_bytes() == text


def test_ranks_that_see_different_folders_load_what_rank_0_sees(tmp_path):
    def lagging():
        write(tmp_path, 1, 2)
        if dist.get_rank() == 1:
            mock.patch.object(Path, "glob", return_value=[tmp_path / "step-1"]).start()
        return load_newest(tmp_path, *trainer()).step

    assert run(2, lagging) == [2, 2]


@pytest.mark.parametrize("change", ["longer", "shorter", "wider"])
def test_another_model_is_no_damage_and_no_reason_to_fall_back(alone, tmp_path, change, caplog):
    def other() -> nn.Module:
        model, linear = build(), nn.Linear(16, 17).double()
        return {"longer": model.append(linear), "shorter": model[:2], "wider": model[:3].append(linear)}[change]

    save(tmp_path, *trainer(model=other()), 1)  # this one would fit
    write(tmp_path, 2)
    for started in (True, False):
        pair = trainer(model=other())
        pair[0](tokens(3)).sum().backward()
        if started:
            pair[1].step()
        before = bits(*pair)
        with pytest.raises(CheckpointError, match="step-2 does not load: is it of a model of other sizes") as caught:
            load_newest(tmp_path, *pair)
        assert not isinstance(caught.value, DamagedError)
        same(bits(*pair), before)
    assert checkpoint.__name__ not in {record.name for record in caplog.records}


def test_what_a_crash_left_does_not_disturb(tmp_path):
    for file in (".metadata", "__0_0.distcp", "__9_0.distcp", "checksums.json", "rank-5.pt", "deep/down"):
        for name in ("step-1.incomplete", "step-7.incomplete"):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(b"junk")
    same(run(2, write, tmp_path, 1)[0], run(1, read, tmp_path / "step-1")[0][1])
    assert names(tmp_path) == ["step-1"]
    assert "deep" not in names(tmp_path / "step-1")


def failing(folder: Path, where: str):
    """One rank fails in one place, for real where that can be; then there is room on the disk again."""
    expected, pair, rank = write(folder, 1), trainer(2), dist.get_rank()
    limit = {"data": 9000, "rank state": 2**21}.get(where, -1)
    bad = {"rank state": torch.zeros(2**20), "what cannot be read": Path("x")}.get(where)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    if rank == 0 and where in ("mkdir", "as_list"):  # the first and the last that is done
        mock.patch.object(Path if where == "mkdir" else snapshot, where, side_effect=OSError("not yours")).start()
    with pytest.raises(CheckpointError) as caught:
        save(folder, *pair, 2, {"not": object()} if where == "extra" else None, bad if rank == 1 else None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    mock.patch.stopall()
    same(read(folder / "step-1")[1], expected)
    write(folder, 2)
    return str(caught.value)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("where", "words"),
    {
        "data": "cannot be written: rank 1: ",
        "rank state": "rank 1: OSError: [Errno 27] File too large",
        "what cannot be read": "rank 1: UnpicklingError: Weights only load failed",
        "mkdir": "rank 0: OSError: not yours",
        "as_list": "rank 0: OSError: not yours",
        "extra": "rank 0: TypeError: Object of type object is not JSON serializable",
    }.items(),
)
def test_what_fails_on_one_rank_is_raised_on_all_and_harms_no_other_checkpoint(tmp_path, where, words):
    (said,) = {*run(3, failing, tmp_path, where)}
    assert words in said
    assert names(tmp_path) == ["step-1", "step-2"]


def test_all_of_it_is_on_the_disk_before_it_has_its_name(alone, tmp_path):
    done, fsync, rename = [], os.fsync, Path.rename

    def spied(path, target=None):
        done.append(os.readlink(f"/proc/self/fd/{path}") if target is None else f"{path} renamed")
        return fsync(path) if target is None else rename(path, target)

    with mock.patch("os.fsync", spied), mock.patch.object(Path, "rename", spied):
        write(tmp_path, 1)
    aside = f"{tmp_path}/step-1.incomplete"
    assert done[-3:] == [aside, f"{aside} renamed", str(tmp_path)]
    assert {name.removesuffix(".tmp") for name in done} >= {f"{aside}/{name}" for name in names(tmp_path / "step-1")}


@pytest.mark.parametrize(
    ("keep", "damaged", "left"),
    [(1, (), {10}), (2, (), {3, 10}), (4, (), {1, 2, 3, 10}), (1, (10,), {3, 10}), (1, (3, 10), {2, 10})],
)
def test_prune_keeps_the_newest_and_the_newest_intact(saved, tmp_path, keep, damaged, left):
    for step in (1, 2, 3, 10):
        shutil.copytree(saved[0], tmp_path / f"step-{step}")
    for step in damaged:
        (tmp_path / f"step-{step}" / "rank-0.pt").write_bytes(b"")
    run(2, prune, tmp_path, keep)
    assert names(tmp_path) == sorted(f"step-{step}" for step in left)


def test_prune_logs_what_it_cannot_delete_and_keeps_one_at_least(alone, copy, caplog):
    older = shutil.copytree(copy, copy.parent / "step-1")
    with mock.patch.object(Path, "rename", side_effect=OSError("busy")):
        prune(copy.parent, 1)
    assert f"{older} is not deleted: busy" in caplog.messages
    with pytest.raises(ValueError, match="keep"):
        prune(copy.parent, 0)
