"""A checkpoint that anyone may have made runs no code; one that a rank, a disk or a number spoils is not made."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checkpoints import names
from ranks import run
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from turnout.models.checkpoint import (
    CheckpointError,
    DamagedError,
    WriteError,
    contents,
    load,
    load_newest,
    newest,
    prune,
    save,
)


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW((model := nn.Linear(3, 2)).parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def path(tmp_path) -> Path:
    return save(tmp_path / "saved", *trained(), 1, {"of": "us"}, {"rng": torch.get_rng_state()})


def forge(path: Path, **files: bytes) -> None:
    """Write files, and a list of them with the right checksums."""
    for name, data in files.items():
        (path / name).write_bytes(data)
    listed = json.loads((path / "checksums.json").read_bytes())["files"]
    for name in listed:
        data = (path / name).read_bytes()
        listed[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge_list(path, listed)


def forge_list(path: Path, listed: dict) -> None:
    own = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    (path / "checksums.json").write_text(json.dumps({"files": listed, "sha256": own}, indent=1, sort_keys=True))


def forged_value(path: Path, name: str, value: object) -> None:
    """Put a pickled value where a checkpoint has that of a name."""
    buffer, metadata = io.BytesIO(), pickle.loads((path / ".metadata").read_bytes())
    torch.save(value, buffer)
    data = (path / "__0_0.distcp").read_bytes()
    for index, where in metadata.storage_data.items():
        if index.fqn == name:
            metadata.storage_data[index] = replace(where, offset=len(data), length=buffer.tell())
    forge(path, **{"__0_0.distcp": data + buffer.getvalue(), ".metadata": pickle.dumps(metadata)})


def refusal(path: Path, kind: type = DamagedError) -> str:
    """What load says; nothing changed."""
    model, optimizer = trained()
    with torch.no_grad():
        model.weight.zero_()
    moments = {p: {key: value.clone() for key, value in state.items()} for p, state in optimizer.state.items()}
    with pytest.raises(CheckpointError) as caught:
        load(path, model, optimizer)
    assert type(caught.value) is kind
    assert not model.weight.any()
    assert all(
        torch.equal(value, optimizer.state[p][key]) for p, each in moments.items() for key, value in each.items()
    )
    return str(caught.value)


@pytest.mark.parametrize("where", [".metadata", "step", "extra", "optimizer.param_groups.weight.lr", "rank-0.pt"])
def test_code_in_a_checkpoint_is_not_run(path, tmp_path, where):
    code, made = Code(tmp_path / "made"), tmp_path / "made"
    pickle.loads(pickle.dumps(code))
    assert made.is_dir()  # it works, where it may
    made.rmdir()
    if where == ".metadata":
        metadata = pickle.loads((path / where).read_bytes())
        metadata.planner_data = code
        forge(path, **{where: pickle.dumps(metadata)})
    elif where == "rank-0.pt":
        torch.save(code, path / where)
        forge(path)
    else:
        forged_value(path, where, code)
    assert str(path) in (said := refusal(path))
    assert "may be code, and was not run" in said or "asks for posix.mkdir, which no checkpoint needs" in said
    assert not made.exists()


@pytest.mark.parametrize("name", ["model.weight", "optimizer.state.weight.exp_avg"])
def test_code_in_place_of_a_tensor_is_not_run(path, tmp_path, name):
    forged_value(path, name, Code(tmp_path / "made"))
    assert refusal(path) == f"{path}/__0_0.distcp: {name} is no tensor; it may be code, and was not run"
    assert not (tmp_path / "made").exists()


def test_code_in_place_of_a_buffer_is_not_run_and_what_was_read_by_then_is_told(tmp_path):
    model, optimizer = trained()
    model.register_buffer("mask", torch.ones(3))
    forged_value(path := save(tmp_path, model, optimizer, 1), "model.mask", Code(tmp_path / "made"))
    with pytest.raises(CheckpointError, match=r"a part was read into .*, then reading failed: .* was not run"):
        load(path, model, optimizer)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "torch.Size.__class__", "torch.hub.load"])
def test_what_describes_a_checkpoint_may_ask_for_nothing_else(path, name):
    module, _, function = name.partition(".Size")[0].rpartition(".") if ".Size" not in name else ("torch", "", name[6:])
    short = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, function)]
    forge(path, **{".metadata": b"\x80\x04" + b"".join(short) + b"\x93."})
    assert f"it asks for {module}.{function}, which no checkpoint needs" in refusal(path)


@pytest.mark.parametrize("data", [b"", b"no pickle", pickle.dumps({}), pickle.dumps(3)])
def test_what_does_not_describe_a_checkpoint_is_named(path, data):
    forge(path, **{".metadata": data})
    assert f"{path}/.metadata does not describe a checkpoint, nothing is loaded" in refusal(path)


@pytest.mark.parametrize("name", ["../saved/secret", "/etc/hostname", "unlisted", "__0_0.distcp/../unlisted"])
def test_no_file_is_read_that_the_checkpoint_does_not_list(path, name):
    metadata = pickle.loads((path / ".metadata").read_bytes())
    (path / "unlisted").write_bytes((path / "__0_0.distcp").read_bytes())
    metadata.storage_data = {i: replace(where, relative_path=name) for i, where in metadata.storage_data.items()}
    forge(path, **{".metadata": pickle.dumps(metadata)})
    assert f"is said to be in {name}, which is not in the list of files" in refusal(path)


@pytest.mark.parametrize("name", ["../step-1/rank-0.pt", "/etc/hostname", "..", ".", "", "a/b", "a\0b"])
def test_a_list_names_files_of_the_folder_only(path, name):
    listed = json.loads((path / "checksums.json").read_bytes())["files"]
    forge_list(path, listed | {name: listed["rank-0.pt"]})
    assert f"checksums.json lists {name!r}, which is no file of a checkpoint" in refusal(path)


@pytest.mark.parametrize("files", [[], 3, {"a": 3}, {"a": {"size": 1}}, {"a": []}])
def test_a_list_of_another_form_is_refused(path, files):
    forge_list(path, files)
    assert str(path / "checksums.json") in refusal(path)


def test_a_file_that_points_elsewhere_is_refused(path, tmp_path):
    (path / "rank-0.pt").rename(tmp_path / "elsewhere.pt")
    (path / "rank-0.pt").symlink_to(tmp_path / "elsewhere.pt")
    assert refusal(path).startswith(f"{path}/rank-0.pt is no plain file")
    (path / "rank-0.pt").unlink()
    os.mkfifo(path / "rank-0.pt")  # reading it would wait for ever
    assert refusal(path).startswith(f"{path}/rank-0.pt is no plain file")


def test_files_that_are_not_listed_are_left_alone(path, tmp_path):
    for name in ("rank-1.pt", "__9_9.distcp", "__0.metadata"):
        (path / name).write_bytes(pickle.dumps(Code(tmp_path / "made")))
    assert load(path, *trained()).rank_state.keys() == {"rng"}
    assert not (tmp_path / "made").exists()
    listed = json.loads((path / "checksums.json").read_bytes())["files"]
    forge_list(path, {name: entry for name, entry in listed.items() if name != ".metadata"})
    assert "lists no .metadata" in refusal(path)


def spread(value: float = 1.0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A weight of which each rank has a row."""
    model = nn.Linear(3, 2, bias=False)
    mesh = init_device_mesh("cpu", (2,))
    weight = distribute_tensor(torch.ones(2, 3), mesh, [Shard(0)])
    weight.to_local().mul_(value)
    model.weight = nn.Parameter(weight)
    return model, torch.optim.AdamW(model.parameters())


def save_apart(folder: Path) -> str:
    own = folder / ("shared" if dist.get_rank() == 0 else "of another node")
    with pytest.raises(CheckpointError) as caught:
        save(own, *spread(), 1)
    assert newest(own) is None
    return str(caught.value)


def test_ranks_that_do_not_share_the_folder_are_told_and_nothing_is_saved(tmp_path):
    (said,) = {*run(2, save_apart, tmp_path)}
    assert "rank 1 wrote" in said
    assert "which for rank 0 is not there: the folder must be the same for all ranks, on a file system that" in said


def save_not_finite(folder: Path, value: float, where: str) -> str:
    model, optimizer = spread(value if where == "model" and dist.get_rank() == 1 else 1.0)
    model.register_buffer("mask", torch.tensor([float("-inf")]))  # is no fault
    save(folder, *spread(), 1)
    if where == "optimizer":
        optimizer.state[model.weight] = {"exp_avg": model.weight.detach() * (value if dist.get_rank() == 1 else 1.0)}
    with pytest.raises(CheckpointError) as caught:
        save(folder, model, optimizer, 2)
    assert newest(folder) == folder / "step-1"
    return str(caught.value)


@pytest.mark.parametrize(("value", "where"), [(float("nan"), "model"), (float("-inf"), "optimizer")])
def test_numbers_that_are_not_finite_are_not_saved(tmp_path, value, where):
    (said,) = {*run(2, save_not_finite, tmp_path, value, where)}
    name = {"model": "model.weight", "optimizer": "optimizer.state.weight.exp_avg"}[where]
    assert said.startswith(f"rank 1: {name} and 0 other tensors have NaN or infinity")


def full(*_: object) -> None:
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError:  # as torch's writer of zip files does
        raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904


def save_to_full_disk(folder: Path, what: str) -> str:
    save(folder, *spread(), 1)
    target = (FileSystemWriter, "write_data") if what == "data" else (Path, "write_bytes")
    if dist.get_rank() == 1:
        mock.patch.object(*target, side_effect=full).start()
    with pytest.raises(WriteError) as caught:
        save(folder, *spread(), 2)
    mock.patch.stopall()
    assert dist.get_rank() != 0 or names(folder) == ["step-1"]  # what was written gives its room back
    assert load_newest(folder, *spread()).step == 1
    save(folder, *spread(), 2)  # there is room again
    assert load_newest(folder, *spread()).step == 2
    return str(caught.value)


def with_a_number(folder: Path, value: float, where: str) -> str:
    """A checkpoint as older versions and other tools would write it; what loads the newest says."""
    model, optimizer = spread()
    model.register_buffer("mask", torch.tensor([float("-inf")]))  # is no fault
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    save(folder, model, optimizer, 1)
    if dist.get_rank() == 1:
        held = model.weight.detach() if where == "model" else optimizer.state[model.weight]["exp_avg"]
        held.to_local()[0, 0] = value
    with mock.patch.object(contents, "_check_finite"):
        save(folder, model, optimizer, 2)
    loaded = load_newest(folder, model, optimizer)
    assert loaded.step == 1
    assert model.weight.to_local().isfinite().all()
    assert optimizer.state[model.weight]["exp_avg"].to_local().isfinite().all()
    prune(folder, 1)  # not the only one that trains
    assert load_newest(folder, model, optimizer).step == 1
    save(folder, model, optimizer, 2)  # it is in the way
    assert load_newest(folder, model, optimizer).step == 2
    with pytest.raises(CheckpointError) as caught:
        load(folder / "step-2.damaged", model, optimizer)
    return str(caught.value)


@pytest.mark.parametrize(("value", "where"), [(float("nan"), "model"), (float("inf"), "optimizer")])
def test_a_checkpoint_with_a_number_that_is_not_finite_is_passed_over(tmp_path, value, where):
    (said,) = {*run(2, with_a_number, tmp_path, value, where)}
    name = {"model": "model.weight", "optimizer": "optimizer.state.weight.exp_avg"}[where]
    assert said == f"{tmp_path}/step-2.damaged/__1_0.distcp: {name} has NaN or infinity; nothing can be trained from it"
    assert names(tmp_path) == ["step-1", "step-2", "step-2.damaged"]


def test_what_is_passed_over_is_said(tmp_path, caplog):
    model, optimizer = trained()
    save(tmp_path, model, optimizer, 1)
    model.weight.data[0, 0] = math.nan
    with mock.patch.object(contents, "_check_finite"):
        save(tmp_path, model, optimizer, 2)
    assert load_newest(tmp_path, model, optimizer).step == 1
    (message,) = (record.message for record in caplog.records if record.name == "turnout.models.checkpoint")
    assert "step-2/__0_0.distcp: model.weight has NaN or infinity" in message
    assert message.endswith("trying the one before")


@pytest.mark.parametrize("what", ["data", "rank state"])
def test_a_full_disk_is_named_and_earlier_checkpoints_stay(tmp_path, what):
    (said,) = {*run(2, save_to_full_disk, tmp_path, what)}
    assert f"rank 1: the disk of {tmp_path}/step-2.incomplete is full or over its quota, with " in said
    assert "MiB free: make room" in said
