"""A transport chosen by costs: one choice for all ranks, made once and said once, and results as ever."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, build, tokens, whole
from ranks import errors, run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from turnout.dispatch import AutoDispatcher, Profile
from turnout.dispatch.profile import Link
from turnout.moe import MoE, aux_loss, parallelize, sync_gradients

CHEAP, USUAL = Link(0.0, 0.0, 0.0), Link(1e-5, 1e-5, 1e-9)
PROFILES = {
    "flat": Profile(2, 2, Link(1.0, 1.0, 1.0), CHEAP),
    "2dh": Profile(2, 2, CHEAP, Link(0.0, 1.0, 0.0)),
    "node": Profile(2, 2, CHEAP, Link(0.0, 0.0, 1.0)),
}
CHOICES = pytest.mark.parametrize("choice", PROFILES)


def by_node():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))


def results(model: nn.Module, mesh) -> list[Tensor]:
    """Output and gradients, of ranks with unequal numbers of tokens."""
    x = tokens(17).split([5, 0, 9, 3])[dist.get_rank()].clone().requires_grad_()
    y = model(x)
    (y.square().sum() + aux_loss(model)).backward()
    sync_gradients(model, mesh)
    assert x.grad is not None
    return [y.detach(), x.grad, *(whole(p.grad) for p in model.parameters() if p.grad is not None)]


def same(choice: str) -> list[str | None]:
    mesh = by_node()
    auto = parallelize(build(), mesh, profile=PROFILES[choice])
    found, expected = results(auto, mesh), results(parallelize(build(), mesh, choice), mesh)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    flat = results(parallelize(build(), mesh, "flat"), mesh)
    for a, b in zip(found, flat, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    return [auto[i].dispatcher.chosen for i in (1, 3)]


@CHOICES
def test_results_are_those_of_the_transport(choice):
    assert run(4, same, choice) == [[choice] * 2] * 4


def each_its_own(folder) -> str | None:
    """Ranks that were given different files: that of rank 0 counts."""
    path = folder / f"{dist.get_rank()}.json"
    PROFILES[["node", "2dh", "flat", "2dh"][dist.get_rank()]].save(path)
    model = parallelize(build(), by_node(), profile=path)
    model(tokens(dist.get_rank()))
    return model[1].dispatcher.chosen


def test_all_ranks_choose_alike(tmp_path):
    assert run(4, each_its_own, tmp_path) == ["node"] * 4


def measured() -> str | None:
    model = parallelize(build(), by_node())
    assert isinstance(model[1].dispatcher, AutoDispatcher)
    assert model[1].dispatcher.chosen is None
    model(tokens(3))
    return model[1].dispatcher.chosen


def test_without_a_profile_it_measures():
    (choice,) = set(run(4, measured))
    assert choice in PROFILES


def said(number: int) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("turnout")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    model = parallelize(build(), by_node(), profile=PROFILES["2dh"])
    for _ in range(number):
        model(tokens(3))
    return lines


def test_it_says_its_choice_once():
    first, *others = run(4, said, 3)
    assert others == [[]] * 3
    (line,) = first
    assert line.startswith("dispatcher 2dh for Message(tokens=3, row_bytes=128, top_k=3, num_experts=8)")
    assert "predicted, forward and backward: flat" in line


def nothing_first() -> list[str | None]:
    """Without tokens it chooses as for one, and keeps to it: an overlapping dispatcher's chunks must go one way."""
    model, found = parallelize(build(), by_node(), profile=PROFILES["2dh"]), []
    for number in (0, 3):
        model(tokens(number))
        found.append(model[1].dispatcher.chosen)
    return found


def test_it_keeps_a_choice_made_without_tokens():
    assert run(4, nothing_first) == [["2dh", "2dh"]] * 4


def wrong_width() -> None:
    model = nn.ModuleList([MoE(WIDTH, 12, EXPERTS, seed=0)])
    layer = parallelize(model, by_node(), profile=PROFILES["node"])[0]
    layer(tokens(3, torch.float32)[:, : WIDTH - (dist.get_rank() == 2)])


def test_a_rank_that_raises_before_the_choice():
    found = errors(4, wrong_width, timeout=30)
    assert found[2].startswith(f"ValueError: x must be (..., {WIDTH})")
    for rank in (0, 1, 3):
        assert found[rank].startswith("DispatchError: rank 2 of the expert group: raised an error")


def bad(path) -> None:
    parallelize(build(), by_node(), profile=path)


def test_a_bad_profile_is_an_error_on_every_rank(tmp_path):
    path = tmp_path / "profile.json"
    for found in errors(4, bad, path, timeout=30):
        assert found.startswith("ValueError: [Errno 2] No such file")
    path.write_text("{}")
    for found in errors(4, bad, path, timeout=30):
        assert found.startswith(f"ValueError: {path} is not a profile")
    Profile(4, 2, USUAL, USUAL).save(path)
    for found in errors(4, bad, path, timeout=30):
        assert found.startswith("ValueError: the profile is of 4 nodes of 2 ranks, the mesh has 2 of 2")


@pytest.mark.slow
def test_the_command(tmp_path):
    path = tmp_path / "profile.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    probe = ["-m", "turnout.dispatch.probe", "--nodes", "2", "--save", str(path)]
    result = subprocess.run([*launch, *probe], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "| between nodes |" in result.stdout
    profile = Profile.load(path)
    assert (profile.nodes, profile.locals) == (2, 2)
    assert json.loads(path.read_text())["inside"]["message"] > 0
