"""A transport and chunks chosen by costs: one choice for all ranks, made once and said once, and results as ever."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from cases import EXPERTS, WIDTH, build, log_lines, tokens, whole
from ranks import errors, run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from turnout.dispatch import AutoDispatcher, Profile
from turnout.dispatch.autoselect.profile import Choice, Flop, Link
from turnout.moe import Capacity, MoE, aux_loss, parallelize, sync_gradients

CHEAP, USUAL = Link(0.0, 0.0, 0.0), Link(1e-5, 1e-5, 1e-9)
PROFILES = {
    "flat": Profile(2, 2, Link(1.0, 1.0, 1.0), CHEAP),
    "2dh": Profile(2, 2, CHEAP, Link(0.0, 1.0, 0.0)),
    "node": Profile(2, 2, CHEAP, Link(0.0, 0.0, 1.0)),
}
CHUNKS = {  # where links and experts both take long
    "flat": Profile(2, 2, Link(1.0, 1.0, 1.0), Link(0.0, 0.0, 0.1), Flop(0.1)),
    "node": Profile(2, 2, CHEAP, Link(0.0, 0.0, 1.0), Flop(1.0)),
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


def same(profile: Profile, choice: str, degree: int, options: dict) -> list[Choice | None]:
    mesh = by_node()
    auto = parallelize(build(**options), mesh, profile=profile)
    one = parallelize(build(**options), mesh, choice, overlap=degree)
    for _ in range(2):
        found, expected = results(auto, mesh), results(one, mesh)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        auto.zero_grad()
        one.zero_grad()
    flat = results(parallelize(build(**options), mesh, "flat"), mesh)
    for a, b in zip(found, flat, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    return [auto[i].dispatcher.chosen for i in (1, 3)]


OPTIONS = pytest.mark.parametrize("options", [{}, {"capacity": Capacity(1.0, pad=True)}], ids=["ragged", "padded"])


@pytest.mark.sampled
@CHOICES
@OPTIONS
def test_results_are_those_of_the_transport(choice, options):
    assert run(4, same, PROFILES[choice], choice, 1, options) == [[(choice, 1)] * 2] * 4


@pytest.mark.sampled
@pytest.mark.parametrize("choice", CHUNKS)
@OPTIONS
def test_results_in_chunks(choice, options):
    assert run(4, same, CHUNKS[choice], choice, 4, options) == [[(choice, 4)] * 2] * 4


def recomputed() -> list[Choice | None]:
    """Activation checkpointing from the first forward on: what is recomputed is cut as it was."""
    mesh, found = by_node(), []
    for again in (False, True):
        model = parallelize(build(), mesh, profile=CHUNKS["node"])
        layers = [lambda x, layer=layer: checkpoint(layer, x, use_reentrant=False) for layer in model]
        x = tokens(17).split([5, 0, 9, 3])[dist.get_rank()].clone().requires_grad_()
        y = x
        for layer in layers if again else model:
            y = layer(y)
        (y.square().sum() + aux_loss(model)).backward()
        found.append([y.detach(), x.grad, *(whole(p.grad) for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    return [model[i].dispatcher.chosen for i in (1, 3)]


def test_recomputation():
    assert run(4, recomputed) == [[("node", 4)] * 2] * 4


def each_its_own(folder) -> Choice | None:
    """Ranks that were given different files: that of rank 0 counts."""
    path = folder / f"{dist.get_rank()}.json"
    [CHUNKS["node"], PROFILES["2dh"], PROFILES["flat"], PROFILES["2dh"]][dist.get_rank()].save(path)
    model = parallelize(build(), by_node(), profile=path)
    model(tokens(dist.get_rank()))
    return model[1].dispatcher.chosen


def test_all_ranks_choose_alike(tmp_path):
    assert run(4, each_its_own, tmp_path) == [("node", 4)] * 4


def measured() -> Choice | None:
    model = parallelize(build(), by_node())
    assert isinstance(model[1].dispatcher, AutoDispatcher)
    assert model[1].dispatcher.chosen is None
    model(tokens(3))
    return model[1].dispatcher.chosen


def test_without_a_profile_it_measures():
    (choice,) = set(run(4, measured))
    assert choice.transport in PROFILES
    assert choice.degree in (1, 2, 4)


def said(number: int) -> list[str]:
    lines = log_lines()
    model = nn.Sequential(*(MoE(WIDTH, 12, EXPERTS, top_k=3, seed=0) for _ in range(2))).double()
    parallelize(model, by_node(), profile=CHUNKS["node"])
    for _ in range(number):
        model(tokens(3))
    return lines


def test_it_says_its_choice_once():
    first, *others = run(4, said, 3)
    assert others == [[]] * 3
    (line,) = first
    message = "Message(tokens=3, row_bytes=128, top_k=3, num_experts=8, row_flops=1152.0, narrow=False)"
    assert line.startswith(f"dispatcher node, chunks: 4, for {message}; predicted time of forward and backward")
    assert re.search(
        r"in 1: flat [\d.e+]+ ms, 2dh [\d.e+]+ ms, node [\d.e+]+ ms, node in pieces [\d.e+]+ ms; in 2: flat .*; in 4: ",
        line,
    )


def nothing_first() -> list[Choice | None]:
    """Without tokens it chooses as for one, and keeps to it: an overlapping dispatcher's chunks must go one way."""
    model, found = parallelize(build(), by_node(), profile=PROFILES["2dh"]), []
    for number in (0, 3):
        model(tokens(number))
        found.append(model[1].dispatcher.chosen)
    return found


def test_it_keeps_a_choice_made_without_tokens():
    assert run(4, nothing_first) == [[("2dh", 1)] * 2] * 4


def wrong_width(profile: Profile) -> None:
    model = nn.ModuleList([MoE(WIDTH, 12, EXPERTS, seed=0)]).double()
    layer = parallelize(model, by_node(), profile=profile)[0]
    try:
        layer(tokens(3)[:, : WIDTH - (dist.get_rank() == 2)])
    finally:
        (one,) = parallelize(nn.ModuleList([MoE(WIDTH, 12, EXPERTS, seed=0)]).double(), by_node(), "flat")
        one.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(tokens(7)), one(tokens(7)), rtol=1e-12, atol=1e-12)  # all are in step


@pytest.mark.parametrize("profile", [PROFILES["node"], CHUNKS["node"]], ids=["in one piece", "in chunks"])
def test_a_rank_that_raises_before_the_choice(profile):
    found = errors(4, wrong_width, profile)
    assert found[2].startswith(f"ValueError: x must be (..., {WIDTH})")
    for rank in (0, 1, 3):
        assert found[rank].startswith("DispatchError: layer '0': rank 2 of the expert group raised an error")


def bad(path) -> None:
    parallelize(build(), by_node(), profile=path)


def test_a_bad_profile_is_an_error_on_every_rank(tmp_path):
    path = tmp_path / "profile.json"
    for found in errors(4, bad, path):
        assert found.startswith("ValueError: [Errno 2] No such file")
    path.write_text("{}")
    for found in errors(4, bad, path):
        assert found.startswith(f"ValueError: {path} is not a profile")
    Profile(4, 2, USUAL, USUAL).save(path)
    for found in errors(4, bad, path):
        assert found.startswith("ValueError: profile is for 4 nodes of 2 ranks, the mesh has 2 nodes of 2")


@pytest.mark.slow
def test_the_command(tmp_path):
    path = tmp_path / "profile.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    probe = ["-m", "turnout.dispatch.autoselect.probe", "--nodes", "2", "--save", str(path)]
    result = subprocess.run([*launch, *probe], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "| between nodes |" in result.stdout
    profile = Profile.load(path)
    assert (profile.nodes, profile.locals) == (2, 2)
    assert "products of a rank: float32 " in result.stdout
    given = json.loads(path.read_text())
    assert given["inside"]["message"] > 0
    assert 0 < given["flop"]["float32"] < 1e-6
    assert 0 < given["flop"]["bfloat16"] < 1e-6
